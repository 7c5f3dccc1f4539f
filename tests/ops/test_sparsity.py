"""Masks: against loops in numpy at full shape, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from slope_mm.errors import RecipeError, TensorError
from slope_mm.ops import NMPattern, UnstructuredPattern, nm_mask, parse_pattern, unstructured_mask

Pairs = list[tuple[int, int]]

SMALL_PATTERNS: Pairs = [(n, m) for m in range(2, 9) for n in range(1, m)]
LARGE_PATTERNS: Pairs = [(1, 16), (2, 16), (8, 16), (15, 16), (5, 12), (1, 32), (2, 32), (31, 32)]
# Conv2d, Linear and ConvTranspose2d weights, in groups and kernel positions, with the axis of
# their input channels; and axes that no layer of ours uses. M stands for two groups of channels.
SHAPES: dict[str, tuple[Callable[[int], tuple[int, ...]], int]] = {
    'conv': (lambda m: (3, 2 * m, 2, 3), 1),
    'linear': (lambda m: (4, 2 * m), 1),
    'transposed conv': (lambda m: (2 * m, 3, 2, 2), 0),
    'first of two': (lambda m: (2 * m, 4), 0),
    'last of four': (lambda m: (2, 3, 2, 2 * m), -1),
    'vector': (lambda m: (2 * m,), 0),
}


def groups(shape: tuple[int, ...], m: int, axis: int) -> Iterator[list[tuple[int, ...]]]:
    """The full indices of each group's members, in order."""
    axis %= len(shape)
    others = [1 if i == axis else size for i, size in enumerate(shape)]
    for place in np.ndindex(*others):
        for first in range(0, shape[axis], m):
            yield [(*place[:axis], first + k, *place[axis + 1 :]) for k in range(m)]


def slow_nm_mask(w: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """The definition, one group and one weight after the other."""
    mask = np.zeros(w.shape, dtype=bool)
    for members in groups(w.shape, m, axis):
        ranked = sorted(members, key=lambda index: -abs(w[index]))  # stable: lower index first
        for index in ranked[:n]:
            mask[index] = True
    return mask


def slow_unstructured_mask(w: np.ndarray, keep: int) -> np.ndarray:
    ranked = sorted(np.ndindex(*w.shape), key=lambda index: -abs(w[index]))
    mask = np.zeros(w.shape, dtype=bool)
    for index in ranked[:keep]:
        mask[index] = True
    return mask


def random_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tied_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Few magnitudes of both signs, zeros among them: nearly every group has ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


def assert_same(mask: Tensor, expected: np.ndarray) -> None:
    assert mask.dtype == torch.bool
    assert tuple(mask.shape) == expected.shape
    np.testing.assert_array_equal(mask.numpy(), expected)


# --- N:M -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize(('n', 'm'), SMALL_PATTERNS + LARGE_PATTERNS)
def test_nm_mask_is_the_definition(kind: str, n: int, m: int) -> None:
    make_shape, axis = SHAPES[kind]
    for w in (random_weight(make_shape(m)), tied_weight(make_shape(m))):
        assert_same(nm_mask(w, n, m, axis), slow_nm_mask(w.numpy(), n, m, axis))


def test_the_default_axis_is_the_input_channels_of_a_convolution() -> None:
    w = random_weight((3, 8, 3, 3))
    assert_same(nm_mask(w, 2, 4), slow_nm_mask(w.numpy(), 2, 4, axis=1))


def test_groups_do_not_run_over_flattened_kernels() -> None:
    """With each kernel's weights alike, grouping over C*R*S would keep whole kernels."""
    w = torch.tensor([1.0, 4.0, 2.0, 3.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    expected = torch.tensor([False, True, False, True]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert torch.equal(nm_mask(w, 2, 4), expected)


@pytest.mark.parametrize('value', [0.0, -0.0, 1.5, -1.5])
@pytest.mark.parametrize(('n', 'm'), [(1, 2), (2, 4), (4, 8), (2, 16)])
def test_all_equal_groups_keep_the_first_n(value: float, n: int, m: int) -> None:
    mask = nm_mask(torch.full((2, 2 * m, 3, 1), value), n, m)
    first = torch.arange(2 * m) % m < n
    assert torch.equal(mask, first.reshape(1, -1, 1, 1).expand(mask.shape))


def test_ties_ignore_the_sign_and_go_to_the_lower_index() -> None:
    w = torch.tensor([[1.0, -2.0, 2.0, -1.0], [0.0, -0.0, 0.0, -3.0]])
    assert nm_mask(w, 1, 4).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert nm_mask(w, 3, 4).tolist() == [[True, True, True, False], [True, True, False, True]]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 2), (2, 4), (3, 4), (2, 8), (4, 8), (2, 16)]).flatmap(
        lambda pattern: st.tuples(
            st.just(pattern),
            hnp.arrays(
                np.float32,
                st.tuples(
                    st.integers(1, 3),
                    st.integers(1, 2).map(lambda count: count * pattern[1]),
                    st.integers(1, 2),
                ),
                elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
                | st.floats(-(2.0**100), 2.0**100, width=32),
            ),
        )
    )
)
def test_nm_mask_keeps_exactly_n_and_never_the_smaller(
    case: tuple[tuple[int, int], np.ndarray],
) -> None:
    (n, m), array = case
    w = torch.from_numpy(array)
    mask = nm_mask(w, n, m)
    assert_same(mask, slow_nm_mask(array, n, m, axis=1))
    assert torch.equal(nm_mask(-w, n, m), mask)
    assert torch.equal(nm_mask(w * mask, n, m) & (w != 0), mask & (w != 0))


@pytest.mark.parametrize('pattern', [(2, 8), (2, 16)])
@pytest.mark.parametrize('axis', [0, 1])
def test_sparser_patterns_run_on_two_four_hardware(pattern: tuple[int, int], axis: int) -> None:
    shape = (32, 16, 3, 3) if axis == 0 else (16, 32, 3, 3)
    mask = nm_mask(random_weight(shape), *pattern, axis).numpy()
    kept = [sum(mask[index] for index in members) for members in groups(shape, 4, axis)]
    assert max(kept) == 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(('n', 'm'), [(2, 4), (4, 8), (2, 16)])
def test_every_floating_dtype(dtype: torch.dtype, n: int, m: int) -> None:
    """Low precision makes ties; they are broken as anywhere else."""
    w = random_weight((4, 2 * m, 3, 3)).to(dtype)
    assert_same(nm_mask(w, n, m), slow_nm_mask(w.double().numpy(), n, m, axis=1))
    assert_same(
        unstructured_mask(w, n / m), slow_unstructured_mask(w.double().numpy(), w.numel() * n // m)
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    'channels_last': lambda w: w.contiguous(memory_format=torch.channels_last),
    'transposed': lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    'every second': lambda w: torch.stack([w, w.flip(0)], 2).flatten(1, 2)[:, ::2],
    'slice of a larger one': lambda w: torch.nn.functional.pad(w, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    'flipped': lambda w: w.flip(1).contiguous().flip(1),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('axis', [0, 1])
def test_the_memory_layout_changes_nothing(layout: str, axis: int) -> None:
    plain = tied_weight((8, 16, 3, 2))
    w = LAYOUTS[layout](plain)
    assert torch.equal(w, plain)
    assert_same(nm_mask(w, 2, 8, axis), slow_nm_mask(plain.numpy(), 2, 8, axis))
    assert_same(unstructured_mask(w, 0.3), slow_unstructured_mask(plain.numpy(), round(0.3 * 768)))


def test_a_mask_has_no_graph_and_leaves_the_weight_alone() -> None:
    w = random_weight((4, 8)).requires_grad_()
    before = w.detach().clone()
    assert not nm_mask(w, 2, 4).requires_grad
    assert not unstructured_mask(w, 0.5).requires_grad
    assert torch.equal(w, before)


def test_empty_weights_have_empty_masks() -> None:
    assert nm_mask(torch.zeros(0, 8, 3, 3), 2, 4).shape == (0, 8, 3, 3)
    assert unstructured_mask(torch.zeros(0, 8), 0.5).shape == (0, 8)


# --- unstructured --------------------------------------------------------------------------------


@pytest.mark.parametrize('density', [0.01, 0.25, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize('make', [random_weight, tied_weight, torch.zeros, torch.ones])
def test_unstructured_mask_is_the_definition(
    density: float, make: Callable[[tuple[int, ...]], Tensor]
) -> None:
    w = make((5, 4, 3, 2))
    mask = unstructured_mask(w, density)
    assert_same(mask, slow_unstructured_mask(w.numpy(), round(density * w.numel())))


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=4),
        elements=st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-4, 4, width=32),
    ),
    st.floats(0.001, 1),
)
def test_unstructured_mask_keeps_the_promised_number(array: np.ndarray, density: float) -> None:
    mask = unstructured_mask(torch.from_numpy(array), density)
    assert_same(mask, slow_unstructured_mask(array, round(density * array.size)))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype) -> None:
    w = random_weight((4, 8, 3, 3)).to(dtype)
    w[1, 2, 0, 1] = bad
    w[3, 7, 2, 2] = bad
    with pytest.raises(TensorError, match=r'\(4, 8, 3, 3\) holds 2 NaN or infinite values'):
        nm_mask(w, 2, 4)
    with pytest.raises(TensorError, match='holds 2 NaN or infinite values'):
        unstructured_mask(w, 0.5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_large_finite_weights_are_not_mistaken_for_infinite_ones(dtype: torch.dtype) -> None:
    w = torch.full((2, 8), torch.finfo(dtype).max, dtype=dtype)
    assert nm_mask(w, 2, 4).sum() == 8
    assert unstructured_mask(w, 0.5).sum() == 8


@pytest.mark.parametrize(('n', 'm'), [(0, 4), (4, 4), (5, 4), (-1, 4), (2, 33), (1, 1), (1, 0)])
def test_impossible_patterns_are_refused(n: int, m: int) -> None:
    with pytest.raises(RecipeError, match=f"'{n}:{m}' is not a pattern.*1 <= N < M <= 32"):
        nm_mask(torch.ones(4, 64), n, m)


def test_a_reversed_pattern_is_told_the_right_one() -> None:
    with pytest.raises(RecipeError, match="did you mean '2:4'"):
        parse_pattern('4:2')


def test_an_axis_that_holds_no_groups_is_refused() -> None:
    with pytest.raises(TensorError, match=r'axis 1 of a weight of shape \(8, 6\).*by 4'):
        nm_mask(torch.ones(8, 6), 2, 4)
    with pytest.raises(TensorError, match=r'axis 0 of a weight of shape \(6, 8\)'):
        nm_mask(torch.ones(6, 8), 2, 4, dim=-2)


@pytest.mark.parametrize('dim', [2, -3, 7])
def test_an_axis_that_does_not_exist_is_refused(dim: int) -> None:
    with pytest.raises(TensorError, match=f'no axis {dim}'):
        nm_mask(torch.ones(8, 8), 2, 4, dim=dim)


@pytest.mark.parametrize('density', [0.0, -0.5, 1.5, math.nan])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(RecipeError, match='share of kept weights, above 0 and at most 1'):
        unstructured_mask(torch.ones(8), density)


# --- patterns as a recipe spells them ------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        '',
        '2',
        '2:',
        ':4',
        '2:4:8',
        '2/4',
        '2.5:4',
        'unstructured',
        'unstructured:',
        'dense',
        '-2:4',
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"'N:M'.*'unstructured:0\.5'.*None"):
        parse_pattern(text)


@pytest.mark.parametrize('thing', [2, 0.5, (2, 4), None, ['2:4']])
def test_things_that_are_no_text_are_refused(thing: object) -> None:
    with pytest.raises(RecipeError, match='is not a pattern'):
        parse_pattern(thing)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_nm_patterns_read_back_from_their_names(pattern: tuple[int, int]) -> None:
    made = NMPattern(*pattern)
    assert parse_pattern(made.name) == made
    assert made.name == f'{pattern[0]}:{pattern[1]}'
    assert made.density == pattern[0] / pattern[1]


@settings(deadline=None, max_examples=100)
@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_unstructured_patterns_read_back_from_their_names(share: float) -> None:
    made = UnstructuredPattern(share)
    assert parse_pattern(made.name) == made


@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 2), (2, 8), (4, 8), (2, 16), (7, 9)])
def test_the_index_tells_all_arrangements_of_a_group_apart(n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    bits = pattern.index_bits(5 * m) // 5
    arrangements = sum(bin(number).count('1') == n for number in range(2**m))
    assert 2 ** (bits - 1) < arrangements <= 2**bits
    w = random_weight((3, 5 * m))
    assert pattern.kept(w.numel()) == int(pattern.mask(w, 1).sum())


def test_two_four_takes_three_bits_a_group() -> None:
    assert NMPattern(2, 4).index_bits(4) == 3
    assert NMPattern(2, 4).index_bits(64) == 48


@pytest.mark.parametrize('share', [0.1, 0.5, 1.0])
def test_an_unstructured_index_is_one_bit_a_weight(share: float) -> None:
    pattern = UnstructuredPattern(share)
    w = random_weight((7, 11))
    assert pattern.index_bits(77) == 77
    assert pattern.kept(77) == int(pattern.mask(w, 1).sum())


@pytest.mark.parametrize(('channels', 'fits'), [(4, True), (64, True), (3, False), (6, False)])
def test_a_pattern_knows_which_axes_it_fits(channels: int, fits: bool) -> None:
    assert NMPattern(2, 4).fits(channels) is fits
    assert UnstructuredPattern(0.5).fits(channels)
