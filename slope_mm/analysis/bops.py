"""Bit operations: multiply-accumulates weighted with the bits of both factors.

    BOPs = sum over layers of MACs * density * weight bits * activation bits

(as in UNIQ, arXiv 1804.10969, and Bayesian Bits, arXiv 2005.07093, without the accumulator's term).
Density counts the kept weights of an N:M pattern, since N:M hardware skips the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slope_mm.layers import LAYER_KINDS, CompressedLayer, LayerSpec, stock_type

FLOAT_BITS = 32


@dataclass(frozen=True)
class Operations:
    """What the convolutions and matrix products of some forward calls cost.

    Attributes:
        macs: Multiply-accumulates of the dense layers.
        bops: Bit operations of the layers as they are.
    """

    macs: int
    bops: float


def layer_macs(layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call of a convolution, transposed convolution or linear layer.

    Args:
        layer: The layer.
        inputs: What it got.
        output: What it gave.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.ConvTranspose2d):
        # Every input element meets each weight of its channel once.
        return inputs.numel() * weight[0].numel()
    if isinstance(layer, nn.Conv2d):
        return output.numel() * weight[0].numel()
    return output.numel() * weight.shape[1]


def layer_bops(layer: nn.Module, macs: int) -> float:
    """Bit operations of that many multiply-accumulates in a layer."""
    return spec_bops(layer.slope_spec if isinstance(layer, CompressedLayer) else None, macs)


def spec_bops(spec: LayerSpec | None, macs: int) -> float:
    """Bit operations of multiply-accumulates under a spec; None for a layer that stays as it is."""
    if spec is None:
        return float(macs * FLOAT_BITS * FLOAT_BITS)
    density = 1.0 if spec.pattern is None else spec.pattern.density
    return macs * density * (spec.bits or FLOAT_BITS) * (spec.activation_bits or FLOAT_BITS)


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[tuple[nn.Module, int]]]:
    calls: list[tuple[nn.Module, int]] = []

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((layer, layer_macs(layer, inputs[0], output)))

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if stock_type(module) in LAYER_KINDS
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def count_operations(model: nn.Module, forward: Callable[[], Any]) -> Operations:
    """Counts what one call of ``forward`` costs in the model's layers.

    Args:
        model: A stock or compressed model. Attention's matrix products are not layers and do not
            count, nor do norms and activations.
        forward: Runs the model on some input.
    """
    with _counting(model) as calls:
        forward()
    macs = sum(count for _, count in calls)
    return Operations(macs, sum(layer_bops(layer, count) for layer, count in calls))


def macs_by_layer(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """The same count, layer by layer, by name; a layer that did not run is not in it.

    Args:
        model: As for :func:`count_operations`.
        forward: Runs the model on some input.
    """
    names = {module: name for name, module in model.named_modules()}
    with _counting(model) as calls:
        forward()
    macs: dict[str, int] = {}
    for layer, count in calls:
        macs[names[layer]] = macs.get(names[layer], 0) + count
    return macs
