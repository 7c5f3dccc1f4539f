"""Bits, group ranks, entropy coding, and whole weights against plain loops."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import slow_reader
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_mm.errors import PackedFileError
from slope_mm.packing import entropy
from slope_mm.packing.bits import pack_bits, packed_bytes, unpack_bits
from slope_mm.packing.codec import decode_step, decode_weight, encode_weight
from slope_mm.packing.groups import group_masks, group_ranks, rank_bits
from slope_mm.packing.layout import CODINGS, WeightLayout

# --- bits ----------------------------------------------------------------------------------------


@given(
    st.integers(1, 32).flatmap(
        lambda width: st.tuples(st.just(width), st.lists(st.integers(0, 2**width - 1), max_size=70))
    )
)
def test_bits_are_one_long_number(case: tuple[int, list[int]]) -> None:
    width, values = case
    number = sum(value << (i * width) for i, value in enumerate(values))
    packed = pack_bits(np.array(values, np.uint32), width)
    assert packed.size == packed_bytes(len(values), width)
    assert packed.tobytes() == number.to_bytes(math.ceil(len(values) * width / 8), 'little')
    assert unpack_bits(packed, len(values), width).tolist() == values


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(('n', 'm'), [(n, m) for m in (2, 3, 4, 7, 8, 10) for n in range(1, m)])
def test_ranks_count_the_masks_in_colexicographic_order(n: int, m: int) -> None:
    kept = sorted(itertools.combinations(range(m), n), key=lambda positions: positions[::-1])
    masks = np.array([[i in positions for i in range(m)] for positions in kept])
    assert group_ranks(masks, n).tolist() == list(range(len(kept)))
    assert np.array_equal(group_masks(np.arange(len(kept), dtype=np.uint32), n, m), masks)
    assert rank_bits(n, m) == math.ceil(math.log2(len(kept)))


@pytest.mark.parametrize(('n', 'm'), [(2, 16), (8, 16), (2, 17), (16, 32), (1, 32), (31, 32)])
def test_ranks_of_large_groups(n: int, m: int) -> None:
    random = np.random.default_rng(0)
    masks = np.zeros((200, m), bool)
    for mask in masks:
        mask[random.choice(m, n, replace=False)] = True
    # The first and the last of all.
    masks[0], masks[1] = np.arange(m) < n, np.arange(m) >= m - n
    ranks = group_ranks(masks, n)
    wanted = [
        sum(math.comb(int(p), i + 1) for i, p in enumerate(np.flatnonzero(mask))) for mask in masks
    ]
    assert ranks.tolist() == wanted
    assert wanted[:2] == [0, math.comb(m, n) - 1]
    assert np.array_equal(group_masks(ranks, n, m), masks)


# --- entropy coding ------------------------------------------------------------------------------


def skewed(count: int, size: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.choice(size, count, p=random.dirichlet(np.full(size, 0.5))).astype(np.uint32)


@pytest.mark.parametrize('count', [1, 2, 100, 8192, 8193, 20000])
@pytest.mark.parametrize('size', [2, 15, 256, 300])
@pytest.mark.parametrize('even', [False, True])
def test_three_decoders_agree(
    count: int, size: int, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbols = skewed(count, size, count + size)
    counts = np.bincount(symbols, minlength=size)
    model = entropy.SymbolModel.evenly(size) if even else entropy.SymbolModel.of_counts(counts)
    assert model.freq.sum() == 2**24 and model.freq.min() >= 1
    data = entropy.encode_stream(symbols, model) + b'rest'
    slow, rest = slow_reader.ans_symbols(data, count, model.freq.tolist())
    assert slow == symbols.tolist() and rest == b'rest'
    packed = np.frombuffer(data, np.uint8)
    for _ in range(2):
        found, behind = entropy.decode_stream(packed, count, model)
        assert np.array_equal(found, symbols) and behind.tobytes() == b'rest'
        monkeypatch.setattr(entropy, '_constriction', lambda: None)


def test_entropy_coding_comes_close_to_the_entropy() -> None:
    symbols = skewed(200_000, 16, 0)
    share = np.bincount(symbols, minlength=16) / symbols.size
    bound = -symbols.size * np.sum(share * np.log2(share)) / 8
    model = entropy.SymbolModel.of_counts(np.bincount(symbols, minlength=16))
    assert bound < len(entropy.encode_stream(symbols, model)) < 1.004 * bound


@pytest.mark.parametrize('library', [True, False])
@pytest.mark.parametrize('wrong', ['short', 'word', 'extra'])
def test_streams_that_do_not_end_as_they_should(
    wrong: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbols = np.random.default_rng(0).integers(0, 4, 100).astype(np.uint32)
    model = entropy.SymbolModel.evenly(4)
    data = bytearray(entropy.encode_stream(symbols, model))
    if not library:
        monkeypatch.setattr(entropy, '_constriction', lambda: None)
    if wrong == 'short':
        del data[-4:]
    elif wrong == 'word':
        data[-4:] = bytes(4)
    else:
        # A word more, before the others.
        data[:4] = (int.from_bytes(data[:4], 'little') + 1).to_bytes(4, 'little')
        data[4:4] = b'abcd'
    with pytest.raises(PackedFileError, match='entropy-coded'):
        entropy.decode_stream(np.frombuffer(data, np.uint8), 100, model)


# --- whole weights -------------------------------------------------------------------------------


@st.composite
def weights(draw: Any) -> tuple[WeightLayout, np.ndarray, np.ndarray | None, np.ndarray]:
    """A layout, codes, mask and steps of random shape, pattern, bits, code set and coding."""
    axis = draw(st.integers(0, 1))
    n, m = draw(
        st.sampled_from([(0, 0), (1, 2), (2, 4), (2, 8), (3, 5), (2, 16), (9, 20), (1, 32)])
    )
    inputs = draw(st.integers(1, 3)) * m if m else draw(st.integers(1, 9))
    shape = [draw(st.integers(1, 6)), *draw(st.sampled_from([[], [1, 1], [3, 2]]))]
    shape.insert(axis, inputs)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = None
    if m:
        groups = random.permuted(np.tile(np.arange(m) < n, (math.prod(shape) // m, 1)), axis=1)
        moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
        mask = np.moveaxis(groups.reshape(moved), -1, axis)
    elif draw(st.booleans()):
        mask = random.random(shape) < 0.4
        mask = None if mask.all() else mask
    bits = draw(st.integers(2, 8))
    low, offset = draw(
        st.sampled_from(
            [(-(2 ** (bits - 1)), 0.0), (1 - 2 ** (bits - 1), 0.0), (-(2 ** (bits - 1)), 0.5)]
        )
    )
    high = 2 ** (bits - 1) - 1
    codes = random.integers(low, high + 1, shape).astype(np.int8)
    step = draw(st.sampled_from(['channel', 'tensor']))
    layout = WeightLayout(
        tuple(shape),
        axis,
        math.prod(shape) if mask is None else int(mask.sum()),
        output_axis=1 - axis,
        coding=draw(st.sampled_from(CODINGS)),
        n=n,
        m=m,
        bits=bits,
        qn=low,
        qp=high,
        offset=offset,
        step=step,
    )
    count = shape[1 - axis] if step == 'channel' else 1
    return layout, codes, mask, random.random(count).astype(np.float32)


@given(weights())
@settings(max_examples=300, deadline=None)
def test_weights_come_back(case: Any) -> None:
    layout, codes, mask, steps = case
    written, payload = encode_weight(layout, codes, mask, steps)
    entry = written.to_json()
    read = WeightLayout.from_json(entry, payload.size)
    assert read == written
    found, kept = decode_weight(read, payload)
    if mask is None:
        assert kept is None
    else:
        assert np.array_equal(kept, mask)
        codes = codes * mask
    assert found.dtype == np.int8 and np.array_equal(found, codes)
    assert np.array_equal(decode_step(read, payload).ravel(), steps)


@given(weights())
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_those_of_the_format(case: Any) -> None:
    """By the plain loops of slow_reader, which share nothing with the package."""
    layout, codes, mask, steps = case
    if layout.m == 20:  # Listing all masks takes too long.
        return
    written, payload = encode_weight(layout, codes, mask, steps)
    inner = json.dumps(
        {'layer_defaults': {'bits': 2}, 'layers': {'layer': written.to_json({'bits': 2})}}
    )
    outer = {
        '__metadata__': {'slope_mm': inner},
        'layer.weight': {'data_offsets': [0, payload.size]},
    }
    text = json.dumps(outer).encode()
    content = len(text).to_bytes(8, 'little') + text + payload.tobytes()
    kept, found, read_steps = slow_reader.read_layer(content, 'layer')
    order = np.moveaxis(codes if mask is None else codes * mask, layout.axis, -1).reshape(-1)
    assert found == order.tolist()
    assert read_steps == steps.tolist()
    if mask is not None:
        assert kept == np.moveaxis(mask, layout.axis, -1).reshape(-1).tolist()


def test_what_hardly_holds_information_is_stored_with_fixed_widths() -> None:
    """So that a reader's work is bounded by a file's length."""
    layout = WeightLayout((64, 1024), 1, 64 * 1024, coding='entropy', bits=4, qn=-8, qp=7)
    codes, steps = np.zeros((64, 1024), np.int8), np.ones(64, np.float32)
    written, payload = encode_weight(layout, codes, None, steps)
    assert written.coding == 'enumerative' and payload.size == 64 * 4 + 64 * 1024 // 2
