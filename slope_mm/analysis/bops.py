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

from slope_mm.convert import compressed_layers
from slope_mm.layers import (
    CompressedLayer,
    LayerSpec,
    Projection,
    composite_kind,
    layer_kind,
    stock_type,
)
from slope_mm.layers.activation import first_input

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


def layer_macs(layer: nn.Module, inputs: Tensor, output: Tensor | list[Tensor]) -> int:
    """Multiply-accumulates of one call of a convolution, transposed convolution or linear layer.

    Args:
        layer: The layer.
        inputs: What it got.
        output: What it gave.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if getattr(layer, 'transposed', False):
        # Every input element meets each weight of its channel once.
        return inputs.numel() * weight[0].numel()
    outputs = output if isinstance(output, list) else [output]
    return sum(one.numel() for one in outputs) * weight[0].numel()


def spec_bops(spec: LayerSpec | None, macs: int) -> float:
    """Bit operations of multiply-accumulates under a spec; None for a layer that stays as it is."""
    if spec is None:
        return float(macs * FLOAT_BITS * FLOAT_BITS)
    density = 1.0 if spec.pattern is None else spec.pattern.density
    return macs * density * (spec.bits or FLOAT_BITS) * (spec.activation_bits or FLOAT_BITS)


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    names = {module: name for name, module in model.named_modules()}

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((names[layer], layer_macs(layer, first_input(args, kwargs), output)))

    def count_within(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        kind = composite_kind(stock_type(module))
        for part, macs in kind.products(module, args, kwargs, output) if kind is not None else ():
            calls.append((f'{names[module]}.{part}'.lstrip('.'), macs))

    handles, counted = [], set()
    for module in model.modules():
        kind = composite_kind(stock_type(module))
        if kind is not None:
            counted.update(kind.uncalled(module))
            handles.append(module.register_forward_hook(count_within, with_kwargs=True))
    for module in model.modules():
        layer = not isinstance(module, Projection) and layer_kind(stock_type(module)) is not None
        if layer and module not in counted:
            handles.append(module.register_forward_hook(count, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def count_operations(model: nn.Module, forward: Callable[[], Any]) -> Operations:
    """Counts what one call of ``forward`` costs in the model's layers.

    Args:
        model: A stock or compressed model. Products of two activations, as within attention, do not
            count, nor do norms.
        forward: Runs the model on some input.
    """
    with _counting(model) as calls:
        forward()
    layers: dict[str, CompressedLayer] = compressed_layers(model)
    bops = sum(
        spec_bops(layers[name].slope_spec if name in layers else None, count)
        for name, count in calls
    )
    return Operations(sum(count for _, count in calls), bops)


def macs_by_layer(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """The same count, layer by layer, by name; a layer that did not run is not in it.

    Args:
        model: As for :func:`count_operations`.
        forward: Runs the model on some input.
    """
    with _counting(model) as calls:
        forward()
    macs: dict[str, int] = {}
    for name, count in calls:
        macs[name] = macs.get(name, 0) + count
    return macs
