"""``OnnxDetector``: a registered builder of detectors that run an export.

Configs name it without importing anything; onnxruntime is imported when it is built.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from slope_mm.engine.packed import model_section, stock_model
from slope_mm.engine.refusals import type_name
from slope_mm.errors import ExportError
from slope_mm.export.folder import read_index
from slope_mm.packing.plainconfig import to_plain


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
    stock = dict(type=arch, **model)
    given = index.facts.get('model')
    if arch.rpartition('.')[2] != index.arch or given not in (
        None,
        model_digest(stock_model(stock)),
    ):
        raise ExportError(
            f"'{folder}' is the export of another {index.arch} than the config's {arch} (train_cfg"
            ' and test_cfg aside); give the config that it was exported with'
        )
    # Stock detectors write into the config that they are built from.
    detector = MODELS.build(copy.deepcopy(stock))
    return assemble(detector, index, Path(folder), threads)


def model_digest(stock: Mapping[str, Any]) -> str:
    """Of a stock model section, what tells its network from another one."""
    return hashlib.sha256(json.dumps(_network(stock), sort_keys=True).encode()).hexdigest()


def _network(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _network(v) for k, v in value.items() if k not in ('train_cfg', 'test_cfg')}
    if isinstance(value, (list, tuple)):
        return [_network(item) for item in value]
    return to_plain(value, 'model')


def use_onnx_model(config: Config, folder: str, threads: int | None = None) -> None:
    """Gives a config the detector that an export runs.

    Args:
        config: A config with a SlopeModel or a stock model; it is changed.
        folder: The export.
        threads: As in :func:`OnnxDetector`.
    """
    stock = stock_model(model_section(config.to_dict()))
    stock['arch'] = stock.pop('type')
    # A graph has no weights to average, and cannot be copied for it. A checkpoint of a run with
    # averages holds the averaged ones.
    hooks = config.get('custom_hooks') or []
    config.custom_hooks = [hook for hook in hooks if type_name(hook) != 'EMAHook']
    config.model = dict(type='slope_mm.OnnxDetector', folder=folder, threads=threads, **stock)
