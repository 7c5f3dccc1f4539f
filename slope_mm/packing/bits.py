"""Integers of any width, packed without gaps.

The layout is one string of bits: value ``i`` takes bits ``i * width`` to ``(i + 1) * width - 1``,
its lowest bit first; bit ``j`` of the string is bit ``j % 8`` (counted from the lowest)
of byte ``j // 8``. What the last byte has left over is zero.

    width 3, values 5 (101), 3 (011), 6 (110):   byte 0   1 0 0 1 1 1 0 1   (bit 7 to bit 0)
                                                 byte 1   0 0 0 0 0 0 0 1
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 32


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` values of ``width`` bits take."""
    return (count * width + 7) // 8


def pack_bits(values: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint8]:
    """Packs values below ``2 ** width``.

    Args:
        values: Unsigned integers, flat.
        width: Bits a value, 1 to 32.

    Returns:
        :func:`packed_bytes` bytes.
    """
    count = values.size
    if width > 8:
        as_bytes = np.ascontiguousarray(values, dtype='<u4').view(np.uint8).reshape(count, 4)
        bits = np.unpackbits(as_bytes, axis=1, count=width, bitorder='little')
        return np.packbits(bits.reshape(-1), bitorder='little')
    # Eight values fill `width` whole bytes, and fit into one 64-bit word.
    rows = -(-count // 8)
    padded = np.zeros((rows, 8), np.uint8)
    padded.reshape(-1)[:count] = values
    words = np.zeros(rows, '<u8')
    for position in range(8):
        words |= padded[:, position].astype('<u8') << np.uint64(position * width)
    packed = words.view(np.uint8).reshape(rows, 8)[:, :width]
    return np.ascontiguousarray(packed).reshape(-1)[: packed_bytes(count, width)]


def unpack_bits(packed: NDArray[np.uint8], count: int, width: int) -> NDArray[np.uint32]:
    """The inverse of :func:`pack_bits`.

    Args:
        packed: Exactly ``packed_bytes(count, width)`` bytes.
        count: Number of values.
        width: Bits a value, 1 to 32.

    Returns:
        The values: uint8 up to 8 bits, uint32 above.
    """
    if width > 8:
        bits = np.unpackbits(packed, count=count * width, bitorder='little').reshape(count, width)
        padded = np.zeros((count, 32), np.uint8)
        padded[:, :width] = bits
        return np.packbits(padded, axis=1, bitorder='little').view('<u4').reshape(-1)
    rows = -(-count // 8)
    row_bytes = np.zeros(rows * width, np.uint8)
    row_bytes[: packed.size] = packed
    as_words = np.zeros((rows, 8), np.uint8)
    as_words[:, :width] = row_bytes.reshape(rows, width)
    words = as_words.view('<u8').reshape(-1)
    values = np.empty((rows, 8), np.uint8)
    low = np.uint64(2**width - 1)
    for position in range(8):
        values[:, position] = (words >> np.uint64(position * width)) & low
    return values.reshape(-1)[:count]  # type: ignore[return-value]
