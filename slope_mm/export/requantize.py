"""Convolutions from codes to codes: where a result goes to a single quantizer.

ONNX Runtime's ``QLinearConv`` reads codes in NHWC where they lie, so that nothing is unfolded, adds
an int32 bias, and rounds each sum to the next layer's code while it is in a register: product,
bias, ReLU and quantizer in half the time, or less. But its bias counts in units of the sums, and a
rounded bias changes codes, which a network of 4 bits makes more of from layer to layer.

Sums are integers, though, and few borders lie between the codes of 4 bits: 15. What has to be
kept is on which side of each border every sum lies, and int8 has room for several times the
weights of 4 bits. So of all factors of a channel's weights and all integer biases, with the scale
that suits them best, one is taken that keeps every border between the same two sums; its codes are
those of exact arithmetic for all inputs. Where a channel has none (hundreds of borders between
codes of 8 bits, weights of 8 bits), the layer stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto

# Of a sum of two products, which x86 without VNNI adds in 16 bits (see the module saturation).
LARGEST_PAIR = 2**15 - 1
LARGEST_INT8 = 127
# Of a bias and the sums together, in int32.
LARGEST_SUM = 2**30
# Room for the rounding of scales and products in fp32, relative: 16 of its last places.
MARGIN = 2.0**-19


class Codes(NamedTuple):
    """Codes of a quantizer.

    Attributes:
        step: Of one code.
        low: Smallest code.
        high: Largest code.
        zero: What is added to store them unsigned.
    """

    step: float
    low: int
    high: int
    zero: int


class Requantized(NamedTuple):
    """A convolution's constants.

    Attributes:
        weight: int8, as given but for a factor a channel; 0 in channels of a constant code.
        scale: fp32 ``[out]``: what ``QLinearConv`` takes for a weight's unit.
        bias: int32 ``[out]``, in units of the sums.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def requantized(
    weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, source: Codes, target: Codes
) -> Requantized | None:
    """Constants with which ``QLinearConv`` gives the codes of exact arithmetic, whatever the input.

    Args:
        weight: int8 ``[out, ...]``.
        scale: fp32 ``[out]``, of a weight's unit.
        bias: fp32 ``[out]``, or None.
        source: The input's codes.
        target: The output's codes.

    Returns:
        None where there are none: weights whose products' sums of two would pass 16 bits, a
        negative scale, or a channel without a factor and a bias that keep all borders.
    """
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    largest = np.abs(rows).max(1)
    room = min(LARGEST_INT8, LARGEST_PAIR // (2 * (source.high + source.zero)))
    if (largest > room).any() or (scale <= 0).any():
        return None
    bias = np.zeros(len(rows)) if bias is None else bias
    positive, negative = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    sums = _Sums(
        negative * source.high + positive * source.low,
        positive * source.high + negative * source.low,
        _beyond(scale, bias, source, target),
    )
    # Of a sum, and of no sum, in steps of the output's codes.
    unit = source.step * scale.astype(np.float64) / target.step
    shift = bias.astype(np.float64) / target.step
    factor, offset, slope = _search(largest, unit, shift, sums, target, room)
    constant = sums.codes(sums.least, target) == sums.codes(sums.most, target)
    factor = np.where(constant, 0, factor)
    offset = np.where(constant, sums.codes(sums.least, target), offset)
    slope = np.where(constant, 1, slope)
    made = Requantized(
        (rows * factor[:, None]).astype(np.int8).reshape(weight.shape),
        (slope * target.step / source.step).astype(np.float32),
        offset.astype(np.int32),
    )
    return made if (slope > 0).all() and _holds(made, factor, sums, source, target) else None


class _Sums(NamedTuple):
    """The sums of a channel's products.

    Attributes:
        least: ``[out]``: the least that any input gives.
        most: ``[out]``: the largest.
        beyond: ``[out, borders]``: for each border between two codes the least sum beyond it.
    """

    least: np.ndarray
    most: np.ndarray
    beyond: np.ndarray

    def codes(self, sums: np.ndarray, target: Codes) -> np.ndarray:
        """The codes of sums, ``[out]`` or ``[out, n]``."""
        passed = self.beyond[:, None] <= sums.reshape(len(sums), -1, 1)
        return target.low + passed.sum(2).reshape(sums.shape)


def _beyond(scale: np.ndarray, bias: np.ndarray, source: Codes, target: Codes) -> np.ndarray:
    """The least sum that gives more than each code, ``[out, borders]``.

    In fp64, and in fractions where a sum seems to lie on the border: halves are rounded to even
    codes.
    """
    borders = np.arange(target.low, target.high) + 0.5
    unit = source.step * scale.astype(np.float64)[:, None]
    parts = borders * target.step / unit, bias.astype(np.float64)[:, None] / unit
    exact = parts[0] - parts[1]
    beyond = np.ceil(exact)
    unsure = 1e-12 * (1 + np.abs(parts[0]) + np.abs(parts[1]))
    near = np.abs(exact - np.rint(exact)) <= unsure
    for channel, border in np.argwhere(near & (np.abs(exact) < LARGEST_SUM + unsure)):
        value = Fraction(float(borders[border])) * Fraction(target.step)
        value -= Fraction(float(bias[channel]))
        value /= Fraction(source.step) * Fraction(float(scale[channel]))
        on_it = value.denominator == 1 and (target.low + int(border)) % 2 == 0
        beyond[channel, border] = math.ceil(value) + on_it
    return beyond


def _search(
    largest: np.ndarray,
    unit: np.ndarray,
    shift: np.ndarray,
    sums: _Sums,
    target: Codes,
    room: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each channel factor, bias and scale that leave the most room around borders.

    ``slope * (factor * sum + bias)`` has to pass a border where ``sum`` becomes ``beyond``, and not
    to pass those that no sum passes.

    Returns:
        ``[out]`` each; a slope of 0 where there is none.
    """
    factors, offsets, slopes = np.ones(len(unit)), np.zeros(len(unit)), np.zeros(len(unit))
    widest = np.full(len(unit), MARGIN)
    borders = np.arange(target.low, target.high) + 0.5
    above = borders > 0
    least, most = sums.least[:, None], sums.most[:, None]
    # Sums on both sides of each border: the next ones, or the last that there are.
    over, under = np.maximum(sums.beyond, least), np.minimum(sums.beyond - 1, most)
    passes, stays = sums.beyond <= most, sums.beyond > least
    reach = np.maximum(sums.most, -sums.least)
    for factor in range(1, room + 1):
        exact = shift / unit * factor
        fits = factor * np.maximum(largest, 1) <= room
        fits &= np.abs(exact) + factor * reach < LARGEST_SUM
        for offset in (np.floor(exact), np.floor(exact) + 1):
            high, low = over * factor + offset[:, None], under * factor + offset[:, None]
            # Of slopes: high * slope > border > low * slope.
            from_high, from_low = _ratio(borders, high), _ratio(borders, low)
            larger = np.where(above, passes, stays), np.where(above, from_high, from_low)
            smaller = np.where(above, stays, passes), np.where(above, from_low, from_high)
            bottom = np.where(*larger, 0).max(1)
            top = np.where(*smaller, np.inf).min(1)
            fits_here = fits & np.isfinite(bottom)
            bottom = np.where(fits_here, bottom, 1)
            # Open to one side: no farther than to half or twice of what it is in exact terms.
            bottom = np.maximum(bottom, np.minimum(top, unit / factor) / 2)
            top = np.minimum(top, np.maximum(bottom, unit / factor) * 2)
            width = np.where(fits_here, top / bottom - 1, -1)
            better = width > widest
            widest = np.where(better, width, widest)
            factors = np.where(better, factor, factors)
            offsets = np.where(better, offset, offsets)
            slopes = np.where(better, (bottom + top) / 2, slopes)
    return factors, offsets, slopes


def _ratio(border: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Where a slope takes a value to a border; infinite where both have different signs."""
    same = value * border > 0
    return np.where(same, border / np.where(same, value, 1), np.inf)


def _holds(
    made: Requantized, factor: np.ndarray, sums: _Sums, source: Codes, target: Codes
) -> bool:
    """Whether the runtime's own arithmetic gives the codes.

    It never falls where sums grow, so the sums next to borders and the outermost speak for all.
    """
    least, most = sums.least[:, None], sums.most[:, None]
    beside = np.clip(np.concatenate([sums.beyond - 1, sums.beyond], 1), least, most)
    looked_at = np.concatenate([least, most, beside], 1)
    total = looked_at * factor[:, None] + made.bias[:, None].astype(np.int64)
    unit = np.float32(source.step) * made.scale / np.float32(target.step)
    found = np.rint(total.astype(np.float32) * unit[:, None])
    return bool((np.clip(found, target.low, target.high) == sums.codes(looked_at, target)).all())


class Quantizer(NamedTuple):
    """The only quantizer that a result goes to.

    Attributes:
        node: Its QuantizeLinear.
        rectified: Whether a Relu stands before it.
        value: A DequantizeLinear of its codes.
    """

    node: NodeProto
    rectified: bool
    value: NodeProto


class Targets:
    """Finds the quantizers behind results.

    Args:
        graph: A graph of :func:`~slope_mm.export.graph.lower`.
        takes_pixels: Whether a node takes the codes of its first input in NHWC.
    """

    def __init__(self, graph: onnx.GraphProto, takes_pixels: Callable[[NodeProto], bool]) -> None:
        self.takes_pixels = takes_pixels
        self.outputs = {output.name for output in graph.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)

    def of(self, result: str) -> Quantizer | None:
        """The quantizer that a result goes to, if it goes nowhere else and all want its pixels."""
        node = self._only(result)
        rectified = node is not None and node.op_type == 'Relu'
        if node is not None and rectified:
            node = self._only(node.output[0])
        if node is None or node.op_type != 'QuantizeLinear':
            return None
        codes = node.output[0]
        clip = self._only(codes)
        if clip is not None and clip.op_type == 'Clip':
            codes = clip.output[0]
        values = self._all(codes)
        users = [user for value in values for user in self._all(value.output[0])]
        whole = values and users and all(v.op_type == 'DequantizeLinear' for v in values)
        if not whole or not all(map(self.takes_pixels, users)):
            return None
        return Quantizer(node, rectified, values[0])

    def _all(self, name: str) -> list[NodeProto]:
        """Who takes a value; nobody where it is a result of the graph."""
        return [] if name in self.outputs else self.consumers.get(name, [])

    def _only(self, name: str) -> NodeProto | None:
        return _single(self._all(name))


def _single(nodes: Iterable[NodeProto]) -> NodeProto | None:
    found = list(nodes)
    return found[0] if len(found) == 1 else None
