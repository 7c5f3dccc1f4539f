"""A compressed weight to bytes and back: steps, index, codes.

Weights are visited with the input axis last: a convolution's ``[O, I, R, S]`` as ``[O, R, S, I]``,
a transposed convolution's ``[I, O, R, S]`` as ``[O, R, S, I]``, a matrix as it is. In that order
every M neighbours are a group, and every output below is in that order.

===============  ==========================================  ===================================
coding           index                                       codes (``code - qn``, kept weights)
===============  ==========================================  ===================================
``bitmask``      one bit a weight, 1 where kept              ``bits`` bits each
``enumerative``  N:M: a rank a group, of ceil(log2 C(M, N))  ``bits`` bits each
                 bits; else as ``bitmask``
``entropy``      N:M: the ranks, as evenly likely symbols;   a table of ``qp - qn + 1``
                 else a table of 2 probabilities, and the    probabilities, and the codes as
                 bits as symbols                             symbols
===============  ==========================================  ===================================

The steps come first, one for each output channel or a single one, little-endian in their dtype. A
weight that is not quantized has no steps, and the kept values, little-endian in its dtype, in
place of codes. Dense weights have no index. A table is one u32 a symbol, in units of 2^-24.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slope_mm.errors import PackedFileError
from slope_mm.packing.bits import pack_bits, unpack_bits
from slope_mm.packing.dtypes import NUMPY_DTYPES, as_float32, to_dtype
from slope_mm.packing.entropy import (
    MOST_SYMBOLS_A_BYTE,
    SymbolModel,
    decode_stream,
    encode_stream,
)
from slope_mm.packing.groups import group_masks, group_ranks, rank_bits
from slope_mm.packing.layout import WeightLayout

# Up to here one symbol of the coder is a whole rank; its probabilities stay exact to 2^-12.
LARGEST_SYMBOL = 4096

Codes = NDArray[np.int8]
Mask = NDArray[np.bool_]


def in_group_order(weight: NDArray, axis: int) -> NDArray:
    """Flat, with the input axis last."""
    return np.ascontiguousarray(np.moveaxis(weight, axis, -1)).reshape(-1)


def from_group_order(flat: NDArray, layout: WeightLayout) -> NDArray:
    """The inverse of :func:`in_group_order`."""
    shape = [*layout.shape]
    shape.append(shape.pop(layout.axis))
    return np.ascontiguousarray(np.moveaxis(flat.reshape(shape), -1, layout.axis))


# --- to bytes ------------------------------------------------------------------------------------


def encode_weight(
    layout: WeightLayout, values: NDArray, mask: Mask | None, step: NDArray | None = None
) -> tuple[WeightLayout, NDArray[np.uint8]]:
    """Encodes a weight as its layout says.

    Args:
        layout: Its layout; ``index_bytes`` is found here. Entropy coding that would need less than
            1/8 bit a symbol becomes enumerative.
        values: Codes (int8) or, without bits, raw values; of the weight's shape.
        mask: True where kept, of the weight's shape; None where dense.
        step: Its steps, in their dtype (bfloat16 as its bits); None without bits.

    Returns:
        The layout as written, and the bytes.
    """
    kept = None if mask is None else in_group_order(mask, layout.axis)
    flat = in_group_order(values, layout.axis)
    if kept is not None:
        flat = flat[kept]
    index = b'' if kept is None else _encode_index(layout, kept)
    codes = _encode_codes(layout, flat)
    if layout.coding == 'entropy':
        thin = kept is not None and layout.numel > MOST_SYMBOLS_A_BYTE * len(index)
        if thin or (layout.bits and layout.kept > MOST_SYMBOLS_A_BYTE * len(codes)):
            return encode_weight(replace(layout, coding='enumerative'), values, mask, step)
    steps = b'' if step is None else to_dtype(step, layout.step_dtype).tobytes()
    payload = np.frombuffer(steps + index + codes, np.uint8)
    return replace(layout, index_bytes=len(index)), payload


def _encode_index(layout: WeightLayout, kept: Mask) -> bytes:
    if layout.coding == 'bitmask' or not layout.m:
        if layout.coding != 'entropy':
            return np.packbits(kept, bitorder='little').tobytes()
        bits = kept.view(np.uint8)
        model = SymbolModel.of_counts(np.bincount(bits, minlength=2))
        return model.table().tobytes() + encode_stream(bits, model)
    ranks = group_ranks(kept.reshape(-1, layout.m), layout.n)
    if layout.coding == 'enumerative':
        return pack_bits(ranks, rank_bits(layout.n, layout.m)).tobytes()
    first, second = _rank_radices(layout)
    if second == 1:
        return encode_stream(ranks, SymbolModel.evenly(first))
    return b''.join(
        encode_stream(digits, SymbolModel.evenly(radix))
        for digits, radix in ((ranks // second, first), (ranks % second, second))
    )


def _rank_radices(layout: WeightLayout) -> tuple[int, int]:
    """Radices of the two digits that a rank is coded as; the second is 1 where one is enough.

    Both are about the square root, so that their product is hardly more than the number of ranks.
    """
    ranks = math.comb(layout.m, layout.n)
    if ranks <= LARGEST_SYMBOL:
        return ranks, 1
    second = math.isqrt(ranks - 1) + 1
    return -(-ranks // second), second


def _encode_codes(layout: WeightLayout, kept_values: NDArray) -> bytes:
    if layout.bits is None:
        return to_dtype(kept_values, layout.dtype).tobytes()
    symbols = (kept_values.astype(np.int16) - layout.qn).astype(np.uint8)
    if layout.coding != 'entropy':
        return pack_bits(symbols, layout.bits).tobytes()
    model = SymbolModel.of_counts(np.bincount(symbols, minlength=layout.qp - layout.qn + 1))
    return model.table().tobytes() + encode_stream(symbols, model)


# --- from bytes ----------------------------------------------------------------------------------


def decode_weight(layout: WeightLayout, payload: NDArray[np.uint8]) -> tuple[NDArray, Mask | None]:
    """The inverse of :func:`encode_weight`.

    Returns:
        Codes (int8, 0 where masked) or values, and the mask (None where dense), of the weight's
        shape.

    Raises:
        PackedFileError: If the bytes are no index or no codes of such a weight.
    """
    packed = payload[layout.step_bytes :]
    index, codes = packed[: layout.index_bytes], packed[layout.index_bytes :]
    kept = _decode_index(layout, index) if layout.sparse else None
    values = _decode_codes(layout, codes)
    if kept is None:
        return from_group_order(values, layout), None
    if int(np.count_nonzero(kept)) != layout.kept:
        raise PackedFileError(f'its index does not keep {layout.kept} weights')
    flat = np.zeros(layout.numel, values.dtype)
    flat[kept] = values
    return from_group_order(flat, layout), from_group_order(kept, layout)


def decode_step(layout: WeightLayout, payload: NDArray[np.uint8]) -> NDArray | None:
    """The steps in their dtype (bfloat16 as float32), or None where the weight is not quantized."""
    if layout.bits is None:
        return None
    steps = payload[: layout.step_bytes].view(NUMPY_DTYPES[layout.step_dtype])
    return as_float32(steps, layout.step_dtype).reshape(layout.step_shape)


def _decode_index(layout: WeightLayout, index: NDArray[np.uint8]) -> Mask:
    if layout.coding == 'bitmask' or not layout.m:
        if layout.coding == 'entropy':
            model, rest = _read_table(index, 2)
            bits, rest = decode_stream(rest, layout.numel, model)
            _require_end(rest)
            return bits.astype(np.bool_)
        mask = np.unpackbits(index, count=layout.numel, bitorder='little').view(np.bool_)
        if layout.m and np.any(mask.reshape(-1, layout.m).sum(1, dtype=np.uint8) != layout.n):
            raise PackedFileError(f'a group of its index does not keep {layout.n}')
        return mask
    groups = layout.numel // layout.m
    if layout.coding == 'enumerative':
        ranks: NDArray = unpack_bits(index, groups, rank_bits(layout.n, layout.m))
    else:
        first, second = _rank_radices(layout)
        ranks, rest = decode_stream(index, groups, SymbolModel.evenly(first))
        if second > 1:
            low, rest = decode_stream(rest, groups, SymbolModel.evenly(second))
            ranks = ranks.astype(np.uint32) * np.uint32(second) + low
        _require_end(rest)
    if np.any(ranks >= math.comb(layout.m, layout.n)):
        raise PackedFileError(f'its index holds what is no {layout.n}:{layout.m} group')
    return group_masks(ranks, layout.n, layout.m).reshape(-1)


def _decode_codes(layout: WeightLayout, codes: NDArray[np.uint8]) -> NDArray:
    if layout.bits is None:
        return codes.view(NUMPY_DTYPES[layout.dtype])
    if layout.coding == 'entropy':
        model, rest = _read_table(codes, layout.qp - layout.qn + 1)
        symbols, rest = decode_stream(rest, layout.kept, model)
        _require_end(rest)
    else:
        symbols = unpack_bits(codes, layout.kept, layout.bits)
        if np.any(symbols > layout.qp - layout.qn):
            raise PackedFileError(f'it holds codes above {layout.qp}')
    # int8 arithmetic wraps around, and comes out right.
    return symbols.view(np.int8) + np.int8(layout.qn)


def _read_table(data: NDArray[np.uint8], size: int) -> tuple[SymbolModel, NDArray[np.uint8]]:
    if data.size < 4 * size:
        raise PackedFileError('its table of probabilities ends early')
    return SymbolModel.from_table(data[: 4 * size].view('<u4')), data[4 * size :]


def _require_end(rest: NDArray[np.uint8]) -> None:
    if rest.size:
        raise PackedFileError(f'{rest.size} bytes too many follow its entropy-coded data')


def weight_values(
    layout: WeightLayout, values: NDArray, mask: Mask | None, step: NDArray | None
) -> NDArray:
    """The compressed weight, ``(code + offset) * step`` in float32, then in the weight's dtype.

    Args:
        layout: Its layout.
        values: From :func:`decode_weight`.
        mask: From :func:`decode_weight`.
        step: From :func:`decode_step`.

    Returns:
        Array of the weight's shape; bfloat16 as the same values in float32.
    """
    if layout.bits is None or step is None:
        return as_float32(values, layout.dtype)
    weight = values.astype(np.float32)
    if layout.offset:
        weight += np.float32(layout.offset)
    weight *= step.astype(np.float32)
    if layout.offset and mask is not None:
        weight *= mask
    return as_float32(to_dtype(weight, layout.dtype), layout.dtype)
