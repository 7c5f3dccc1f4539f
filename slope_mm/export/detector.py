"""``OnnxDetector``: a registered builder of detectors that run an export.

Configs name it without importing anything; onnxruntime is imported when it is built.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from slope_mm.engine.packed import stock_model
from slope_mm.export.folder import read_index


@MODELS.register_module()
def OnnxDetector(folder: str, arch: str, threads: int | None = None, **model: Any) -> nn.Module:
    """Builds a stock detector whose heavy parts run in ONNX Runtime. Registered in ``MODELS``.

    Args:
        folder: What ``tools/export.py onnx`` wrote.
        arch: The stock type.
        threads: Threads of one operator; None takes torch's number.
        **model: Everything else of the stock model section.

    Returns:
        The stock detector, without weights. It predicts; it cannot be trained.

    Raises:
        ExportError: If the folder is damaged, or of another detector than ``model``.
    """
    from slope_mm.export.runtime import assemble

    index = read_index(folder)
    # Stock detectors write into the config that they are built from.
    detector = MODELS.build(copy.deepcopy(dict(type=arch, **model)))
    return assemble(detector, index, Path(folder), threads)


def use_onnx_model(config: Config, folder: str, threads: int | None = None) -> None:
    """Gives a config the detector that an export runs.

    Args:
        config: A config with a SlopeModel or a stock model; it is changed.
        folder: The export.
        threads: As in :func:`OnnxDetector`.
    """
    stock = stock_model(config.model.to_dict())
    stock['arch'] = stock.pop('type')
    config.model = dict(type='slope_mm.OnnxDetector', folder=folder, threads=threads, **stock)
