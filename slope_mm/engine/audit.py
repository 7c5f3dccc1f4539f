"""Is every compressed layer really what its recipe says? Asked once, in the first iteration."""

from __future__ import annotations

import torch
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import SlopeError
from slope_mm.ops import NMPattern


@torch.no_grad()
def audit(model: nn.Module, on_ramp: bool = False) -> list[str]:
    """Checks masks and codes of a model after a training step.

    Independent of how they were made: groups are counted in the compressed weight itself.

    Args:
        model: The model.
        on_ramp: Whether masks become sparser during the training: one that is held may be of an
            earlier pattern then, until it is found anew.

    Returns:
        Warnings about layers that did not run in the step.

    Raises:
        SlopeError: Names a layer that breaks its N:M pattern or uses too many codes.
    """
    idle = []
    for name, layer in compressed_layers(model).items():
        if not layer.runs and layer.weight.requires_grad:
            idle.append(name)
        spec = layer.slope_spec
        compressed = layer.compressed_weight()
        mask = layer.mask
        if mask is not None and bool((compressed != 0).logical_and_(~mask).any()):
            raise SlopeError(
                f"layer '{name}' has weights that its mask prunes; this is a bug in slope_mm,"
                ' please report it'
            )
        lags = on_ramp and layer.slope_mask is not None
        if isinstance(layer._pattern_now, NMPattern) and mask is not None and not lags:
            m, axis = layer._pattern_now.m, layer.input_axis
            groups = (compressed != 0).unflatten(axis, (-1, m)).sum(axis + 1)
            if int(groups.max()) > layer._pattern_now.n:
                raise SlopeError(
                    f"layer '{name}' keeps {int(groups.max())} of {m} weights in a group, but its"
                    f' pattern is {layer._pattern_now.name}; this is a bug in slope_mm, please'
                    ' report it'
                )
        codes = spec.weight_codes
        if codes is not None:
            used = layer.codes()
            used = used if mask is None else used[mask]
            count = len(torch.unique(used))
            if count > 2**codes.bits:
                raise SlopeError(
                    f"layer '{name}' uses {count} codes, more than {codes.bits} bits can hold; this"
                    ' is a bug in slope_mm, please report it'
                )
    if not idle:
        return []
    return [
        f'SLOPE: {len(idle)} compressed layers did not run in the first iteration:'
        f' {", ".join(idle[:8])}{", ..." if len(idle) > 8 else ""}. That is fine for heads without'
        ' foreground; a layer whose weight is used without its forward stays uncompressed.'
    ]
