"""How many bits a model takes when each part is stored as its kind allows. The one calculator.

A compressed layer stores its codes (kept weights times bits), the index that says which weights
are kept, its steps, and its bias; everything else stores its tensors as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_mm.layers import CompressedLayer, LayerSpec
from slope_mm.ops import NMPattern, step_shape

STEP_BITS = 32
SIGN_BITS = 8


@dataclass(frozen=True)
class StoredBits:
    """Bits of one layer by what they hold."""

    codes: int = 0
    index: int = 0
    steps: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.codes + self.index + self.steps + self.other


def tensor_bits(tensor: Tensor) -> int:
    """Bits of a tensor in its own dtype."""
    return tensor.numel() * tensor.element_size() * 8


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The stock parameters and persistent buffers of a module itself, without its children's."""
    buffers = [
        (key, buffer)
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    ]
    tensors = [*module.named_parameters(recurse=False), *buffers]
    return [(key, tensor) for key, tensor in tensors if not key.startswith('slope_')]


def weight_bits(
    shape: tuple[int, ...],
    spec: LayerSpec,
    output_axis: int,
    element_bits: int = 32,
    inputs: int = 1,
) -> StoredBits:
    """Bits of a weight under a spec, whether or not it is compressed yet.

    Args:
        shape: Shape of the weight.
        spec: What it gets.
        output_axis: Axis of per-channel steps.
        element_bits: Bits of an element that is not quantized.
        inputs: Number of the layer's inputs.
    """
    numel = 1
    for size in shape:
        numel *= size
    kept = numel if spec.pattern is None else spec.pattern.kept(numel)
    index = 0 if spec.pattern is None else spec.pattern.index_bits(numel)
    codes = kept * (element_bits if spec.bits is None else spec.bits)
    steps = 0
    if spec.bits is not None:
        steps = STEP_BITS
        for size in step_shape(shape, output_axis if spec.step == 'channel' else None):
            steps *= size
    if spec.activation_bits is not None:
        # Each input's step and whether it has a sign.
        steps += inputs * (STEP_BITS + SIGN_BITS)
    return StoredBits(codes, index, steps)


def stored_bits(
    tensors: Mapping[str, Tensor],
    parameter: str,
    spec: LayerSpec | None,
    output_axis: int,
    inputs: int,
) -> StoredBits:
    """Bits of a layer's own tensors when its weight is stored as ``spec`` says.

    Args:
        tensors: The layer's stock tensors by name.
        parameter: Name of the weight among them.
        spec: Its spec; None where it stays as it is.
        output_axis: Axis of per-channel steps.
        inputs: Number of its inputs.
    """
    if spec is None:
        return StoredBits(other=sum(map(tensor_bits, tensors.values())))
    weight = tensors[parameter]
    bits = weight_bits(tuple(weight.shape), spec, output_axis, weight.element_size() * 8, inputs)
    other = sum(tensor_bits(tensor) for key, tensor in tensors.items() if key != parameter)
    return StoredBits(bits.codes, bits.index, bits.steps, other)


def layer_bits(layer: CompressedLayer) -> StoredBits:
    """Bits of a compressed layer's weight and steps."""
    weight = layer.weight
    element_bits = weight.element_size() * 8
    shape, spec = tuple(weight.shape), layer.slope_spec
    return weight_bits(shape, spec, layer.output_axis, element_bits, layer.inputs)


@torch.no_grad()
def order0_bits(layer: CompressedLayer) -> float:
    """Bits below which no code without context can write a layer's index and codes.

    ``log2 C(M, N)`` a group (for unstructured masks the entropy of a weight's being kept), and the
    entropy of the layer's own histogram for each code; values at full precision as they are.
    """
    weight, mask, pattern = layer.weight, layer.mask, layer.slope_spec.pattern
    index = 0.0
    kept = weight.numel()
    if mask is not None and pattern is not None:
        kept = int(mask.sum())
        if isinstance(pattern, NMPattern):
            index = weight.numel() // pattern.m * math.log2(math.comb(pattern.m, pattern.n))
        else:
            index = _entropy_bits(mask.flatten().int())
    if layer.slope_spec.bits is None:
        return index + kept * weight.element_size() * 8
    codes = layer.codes()
    codes = codes.flatten() if mask is None else codes[mask]
    return index + _entropy_bits(codes - int(codes.min()) if codes.numel() else codes)


def _entropy_bits(symbols: Tensor) -> float:
    counts = torch.bincount(symbols.long()).double()
    counts = counts[counts > 0]
    return float((counts * (counts.sum() / counts).log2()).sum())
