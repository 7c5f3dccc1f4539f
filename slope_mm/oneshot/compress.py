"""Compresses a detector without training it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import SlopeError
from slope_mm.layers import CompressedLayer, stock_type
from slope_mm.layers.ties import compressed_ties
from slope_mm.oneshot.latent import latent_weight
from slope_mm.oneshot.matrix import TRANSPOSED, from_matrix, is_product, weight_matrix
from slope_mm.oneshot.moments import SecondMoments, collect, stages
from slope_mm.oneshot.rounding import Compensated, compensate
from slope_mm.ops import NMPattern

#: Bytes of second moments that are held at once, unless another limit is given.
MEMORY = 512 * 2**20


def refusal(layer: CompressedLayer) -> str:
    """Why a layer's rounding cannot be compensated; ``''`` if it can."""
    spec = layer.slope_spec
    if not layer.changes_weight:
        return 'its weight stays as it is'
    if not is_product(layer):
        return f'no unfolded input of {stock_type(layer).__name__}'
    if spec.order != 's_then_q' and spec.pattern is not None:
        return 'quantized first'
    groups = getattr(layer, 'groups', 1)
    shared = spec.step == 'tensor' or stock_type(layer) in TRANSPOSED
    if groups > 1 and spec.bits is not None and shared:
        return 'its groups share steps'
    return ''


@torch.no_grad()
def execution_order(model: nn.Module, forward: Callable[[], Any]) -> dict[str, CompressedLayer]:
    """The compressed layers that run, in the order in which they do first."""
    order: dict[str, CompressedLayer] = {}

    def noting(name: str, layer: CompressedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            order.setdefault(name, layer)

        return hook

    handles = [
        layer.register_forward_pre_hook(noting(name, layer))
        for name, layer in compressed_layers(model).items()
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return order


@torch.no_grad()
def compensate_layer(layer: CompressedLayer, moments: SecondMoments) -> None:
    """Rewrites a layer's latent weight and steps, so that its output is closest to the dense one's.

    Args:
        layer: A layer that :func:`refusal` does not refuse, its weight the dense one.
        moments: Of its input.

    Raises:
        SlopeError: If the weight's dtype cannot hold what was found.
    """
    spec, weight = layer.slope_spec, layer.weight
    matrix = weight_matrix(layer, weight.detach().float())
    pattern = spec.pattern if isinstance(spec.pattern, NMPattern) else None
    settled = None
    if spec.pattern is not None and pattern is None:
        mask = layer.live_mask()
        assert mask is not None
        settled = weight_matrix(layer, mask)
    parts = [
        compensate(
            matrix[group],
            moments.moments[group],
            pattern=pattern,
            mask=None if settled is None else settled[group],
            codes=spec.weight_codes,
            per_row=spec.step == 'channel',
        )
        for group in range(len(matrix))
    ]
    steps = [part.step for part in parts if part.step is not None]
    found = Compensated(
        torch.stack([part.corrected for part in parts]),
        torch.stack([part.mask for part in parts]),
        torch.stack([part.compressed for part in parts]),
        torch.cat(steps) if steps else None,
    )
    width = found.corrected.shape[-1]
    latent = latent_weight(
        found.corrected.reshape(-1, width),
        found.compressed.reshape(-1, width),
        found.mask.reshape(-1, width),
        None if found.step is None else found.step.reshape(-1, 1),
        spec.weight_codes,
        pattern.m if pattern is not None else None,
    )
    weight.copy_(from_matrix(layer, latent.reshape(found.corrected.shape)))
    if found.step is not None and layer.slope_step is not None:
        size = layer.slope_step.numel()
        layer.slope_step.copy_(found.step.reshape(-1)[:size].reshape(layer.slope_step.shape))
    wanted = from_matrix(layer, found.mask)
    if layer.mask is not None and not torch.equal(layer.mask, wanted):
        raise SlopeError(
            f'a weight in {weight.dtype} cannot hold the compensated mask; load the model in fp32'
        )


@torch.no_grad()
def compensate_model(
    model: nn.Module,
    forward: Callable[[], Any],
    *,
    memory: int = MEMORY,
) -> dict[str, str]:
    """Compensates the rounding of all layers, in the order in which they run.

    Second moments are collected stage by stage, each on the outputs of the layers that are
    compressed already.

    Args:
        model: A compressed model with dense latent weights and calibrated inputs, in evaluation.
        forward: Runs it on the calibration images.
        memory: Bytes of second moments that may be held at once; a single layer may take more.

    Returns:
        By name, why a compressed layer was not compensated; ``''`` if it was.
    """
    everyone = compressed_layers(model)
    # One weight cannot be right for several inputs, nor for an embedding's table.
    tied = {id(module) for tie in compressed_ties(model) for module, _ in tie.owners}
    reasons = {
        name: refusal(layer) or ('its weight is tied' if id(layer) in tied else '')
        for name, layer in everyone.items()
    }
    running = execution_order(model, forward)
    for name in everyone.keys() - running.keys():
        reasons[name] = reasons[name] or 'the images do not reach it'
    able = {name: layer for name, layer in running.items() if not reasons[name]}
    for names in stages(able, memory):
        for name, moments in collect(able, names, forward).items():
            if moments.seen:
                compensate_layer(able[name], moments)
            else:
                reasons[name] = 'its input is zero'
    return reasons
