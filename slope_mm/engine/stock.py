"""The stock checkpoint of a baked model: made, told apart, and evaluated."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from slope_mm.convert import bake, compressed_layers, settled_layers
from slope_mm.engine import launch
from slope_mm.engine.checkpoint import BAKED, load_checkpoint_file
from slope_mm.engine.packed import stock_model
from slope_mm.errors import SlopeError
from slope_mm.layers import Projection, stock_type
from slope_mm.layers.ties import compressed_ties
from slope_mm.packing.container import write_atomically


def save_stock(
    model: nn.Module, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None
) -> int:
    """Writes a checkpoint that the stock model loads with ``strict=True``, without slope_mm.

    Args:
        model: A compressed model; it is left as it is.
        path: The file to write.
        meta: What its ``meta`` holds beside, for example ``dataset_meta``.

    Returns:
        The file's length in bytes.

    Raises:
        PackedFileError: If it cannot be written.
        SlopeError: If the stock model cannot hold a compressed weight (weight standardization; one
            parameter of several layers that compress it differently).
    """
    settled = settled_layers(model)
    if settled:
        raise SlopeError(
            f"layer '{settled[0]}' and {len(settled) - 1} others standardize their weights, and a"
            ' stock checkpoint would have its compressed ones standardized again; write a packed'
            " file (tools/export.py packed), or leave them alone (dict(match='type:"
            f"{_stock_name(model, settled[0])}', compress=False))"
        )
    baked = bake(model)
    own = dict(baked.named_parameters(remove_duplicate=False))
    for tie in compressed_ties(model):
        if len({id(own[key]) for key in tie.keys}) > 1:
            raise SlopeError(
                f"'{tie.keys[0]}' and '{tie.keys[1]}' are one parameter of two layers that compress"
                ' it differently, and the stock model has room for one of them; leave both layers'
                ' alone (dict(match=..., compress=False)), or untie them'
            )
    recipe = getattr(model, 'slope_recipe', None)
    told = {**(meta or {}), BAKED: True if recipe is None else recipe.to_dict()}
    content = io.BytesIO()
    torch.save({'meta': told, 'state_dict': baked.state_dict()}, content)
    write_atomically(path, content.getvalue())
    return content.tell()


def _stock_name(model: nn.Module, name: str) -> str:
    layer = compressed_layers(model)[name]
    return stock_type(layer.owner if isinstance(layer, Projection) else layer).__name__


def quantized_inputs(model: nn.Module) -> dict[int, int]:
    """How many layers quantize their input, by bits; what a stock model cannot do."""
    counts: dict[int, int] = {}
    for layer in compressed_layers(model).values():
        bits = layer.slope_spec.activation_bits
        if bits is not None:
            counts[bits] = counts.get(bits, 0) + 1
    return counts


def is_baked(path: str) -> bool:
    """Whether a local checkpoint was made by :func:`save_stock`."""
    if not Path(path).expanduser().is_file():
        return False
    checkpoint = load_checkpoint_file(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    return isinstance(meta, Mapping) and BAKED in meta


def use_stock_model(config: Config) -> None:
    """Gives a config with a SlopeModel its stock model, to evaluate a baked checkpoint."""
    config.model = stock_model(config.model.to_dict())


def evaluate(config: Config, checkpoint: str, backend: str | None = None) -> dict[str, float]:
    """The metrics of a checkpoint on the config's test set.

    Args:
        config: A config with a SlopeModel; it is left as it is.
        checkpoint: A training checkpoint or a packed file; for the backend ``'stock'`` a baked
            checkpoint, for ``'onnxruntime'`` the folder of an export.
        backend: What runs it; None is the config's own model.
    """
    config = copy.deepcopy(config)
    loaded: str | None = checkpoint
    if backend == 'stock':
        use_stock_model(config)
    elif backend == 'onnxruntime':
        from slope_mm.export.detector import use_onnx_model

        use_onnx_model(config, checkpoint)
        loaded = None
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir, config.load_from, config.resume = folder, loaded, False
        # mmengine keeps runs and visualizers by name.
        config.experiment_name = Path(folder).name
        if config.get('visualizer'):
            config.visualizer.update(name=config.experiment_name, vis_backends=None)
        return launch.build_runner(config).test()
