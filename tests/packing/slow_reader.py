"""docs/format.md once more, in plain Python loops: what the package's reader is compared with."""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from typing import Any


def read_header(content: bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The safetensors header, the packed file's own, and where the data begin."""
    (size,) = struct.unpack('<Q', content[:8])
    outer = json.loads(content[8 : 8 + size])
    return outer, json.loads(outer['__metadata__']['slope_mm']), 8 + size


def tensor_bytes(content: bytes, name: str) -> bytes:
    outer, _, start = read_header(content)
    first, last = outer[name]['data_offsets']
    return content[start + first : start + last]


def check_sums(content: bytes) -> None:
    outer, header, start = read_header(content)
    (own,) = struct.unpack('<I', tensor_bytes(content, ':header_crc32'))
    assert own == zlib.crc32(content[:start])
    names = sorted(name for name in outer if name not in ('__metadata__', ':header_crc32'))
    assert header['crc32'] == [zlib.crc32(tensor_bytes(content, name)) for name in names]


def read_bits(data: bytes, first: int, width: int) -> int:
    return sum(
        (data[bit // 8] >> (bit % 8) & 1) << i for i, bit in enumerate(range(first, first + width))
    )


def ans_symbols(data: bytes, count: int, freq: list[int]) -> tuple[list[int], bytes]:
    chunks = math.ceil(count / 8192)
    sizes = struct.unpack(f'<{chunks}I', data[: 4 * chunks])
    at, symbols = 4 * chunks, []
    starts = [0, *itertools.accumulate(freq)]
    for chunk, size in enumerate(sizes):
        words = list(struct.unpack(f'<{size}I', data[at : at + 4 * size]))
        at += 4 * size
        state = 0
        for _ in range(min(2, size)):
            state = state << 32 | words.pop()
        for _ in range(min(8192, count - 8192 * chunk)):
            quantile = state % 2**24
            symbol = next(s for s in range(len(freq)) if quantile < starts[s + 1])
            state = (state >> 24) * freq[symbol] + quantile - starts[symbol]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol)
        assert state == 0 and not words
    return symbols, data[at:]


def even(size: int) -> list[int]:
    freq = [2**24 // size] * size
    freq[-1] += 2**24 - sum(freq)
    return freq


def table(data: bytes, size: int) -> tuple[list[int], bytes]:
    return list(struct.unpack(f'<{size}I', data[: 4 * size])), data[4 * size :]


def read_mask(entry: dict[str, Any], data: bytes) -> list[bool]:
    """Whether each weight is kept, in the order with the input axis last."""
    numel = math.prod(entry['shape'])
    n, m, coding = entry.get('n', 0), entry.get('m', 0), entry.get('coding', 'enumerative')
    if entry['kept'] == numel:
        return [True] * numel
    if not m and coding == 'entropy':
        freq, rest = table(data, 2)
        return [bool(bit) for bit in ans_symbols(rest, numel, freq)[0]]
    if not m or coding == 'bitmask':
        return [bool(read_bits(data, i, 1)) for i in range(numel)]
    masks = sorted(itertools.combinations(range(m), n), key=lambda kept: kept[::-1])
    groups, ranks = numel // m, len(masks)
    if coding == 'enumerative':
        width = math.ceil(math.log2(ranks))
        found = [read_bits(data, i * width, width) for i in range(groups)]
    elif ranks <= 4096:
        found, _ = ans_symbols(data, groups, even(ranks))
    else:
        second = math.isqrt(ranks - 1) + 1
        high, rest = ans_symbols(data, groups, even(-(-ranks // second)))
        low, _ = ans_symbols(rest, groups, even(second))
        found = [h * second + d for h, d in zip(high, low, strict=True)]
    return [position in masks[rank] for rank in found for position in range(m)]


def read_layer(content: bytes, name: str) -> tuple[list[bool], list[int], list[float]]:
    """Mask and codes of all weights in the order with the input axis last, and the steps."""
    header = read_header(content)[1]
    entry = {**header['layer_defaults'], **header['layers'][name]}
    data = tensor_bytes(content, entry.get('key', f'{name}.weight'))
    steps = 1 if entry.get('step') == 'tensor' else entry['shape'][entry.get('output_axis', 0)]
    values = list(struct.unpack(f'<{steps}f', data[: 4 * steps]))
    data = data[4 * steps :]
    index = entry.get('index_bytes', 0)
    mask, data = read_mask(entry, data[:index]), data[index:]
    if entry.get('coding') == 'entropy':
        freq, rest = table(data, entry['qp'] - entry['qn'] + 1)
        symbols, rest = ans_symbols(rest, entry['kept'], freq)
        assert not rest
    else:
        symbols = [read_bits(data, i * entry['bits'], entry['bits']) for i in range(entry['kept'])]
    kept = iter(symbols)
    return mask, [next(kept) + entry['qn'] if here else 0 for here in mask], values
