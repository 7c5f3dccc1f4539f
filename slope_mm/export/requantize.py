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

from collections.abc import Callable, Iterable
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
    # Of a sum, and of no sum, in steps of the output's codes.
    unit = source.step * scale.astype(np.float64) / target.step
    shift = np.zeros(len(rows)) if bias is None else bias.astype(np.float64) / target.step
    positive, negative = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    least = negative * source.high + positive * source.low
    most = positive * source.high + negative * source.low
    codes = np.arange(target.low, target.high)
    borders = codes + 0.5
    # The least sum that gives more than each code; halves are rounded to even ones.
    exact = (borders - shift[:, None]) / unit[:, None]
    beyond = np.ceil(exact) + ((exact == np.rint(exact)) & (codes % 2 == 0))
    crossed = (beyond > least[:, None]) & (beyond <= most[:, None])
    constant = ~crossed.any(1)
    reach = np.maximum(most, -least)
    factor, offset, slope = _search(largest, unit, shift, reach, borders, beyond, crossed, room)
    if not (constant | (slope > 0)).all():
        return None
    code = np.clip(np.rint(least * unit + shift), target.low, target.high)
    factor = np.where(constant, 0, factor)
    offset, slope = np.where(constant, code, offset), np.where(constant, 1, slope)
    return Requantized(
        (rows * factor[:, None]).astype(np.int8).reshape(weight.shape),
        (slope * target.step / source.step).astype(np.float32),
        offset.astype(np.int32),
    )


def _search(
    largest: np.ndarray,
    unit: np.ndarray,
    shift: np.ndarray,
    reach: np.ndarray,
    borders: np.ndarray,
    beyond: np.ndarray,
    crossed: np.ndarray,
    room: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each channel factor, bias and scale that leave the most room around borders.

    ``slope * (factor * sum + bias)`` has to pass a border where ``sum`` becomes ``beyond``.

    Returns:
        ``[out]`` each; a slope of 0 where there is none.
    """
    factors, offsets, slopes = np.ones(len(unit)), np.zeros(len(unit)), np.zeros(len(unit))
    widest = np.full(len(unit), MARGIN)
    above = borders > 0
    for factor in range(1, room + 1):
        exact = shift / unit * factor
        fits = factor * np.maximum(largest, 1) <= room
        fits &= np.abs(exact) + factor * reach < LARGEST_SUM
        for offset in (np.floor(exact), np.floor(exact) + 1):
            high = beyond * factor + offset[:, None]
            low = high - factor
            # Of slopes: high * slope > border > low * slope.
            least = np.where(above, _ratio(borders, high), _ratio(borders, low))
            most = np.where(above, _ratio(borders, low), _ratio(borders, high))
            bottom = np.where(crossed, least, 0).max(1)
            top = np.where(crossed, most, np.inf).min(1)
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
