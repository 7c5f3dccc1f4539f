"""Regularizers of a tensor: against independent formulas in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from regularizer_formulas import reference
from weight_cases import random_tensor

from slope_mm import RecipeError
from slope_mm.ops import (
    GRANULARITIES,
    check_regularizer,
    cosine,
    cosine_distance,
    power_sums,
    regularize,
    relative_l2,
)

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    'conv': ((6, 8, 3, 2), 0),
    'linear': ((6, 16), 0),
    'transposed conv': ((8, 6, 2, 2), 1),
    'one filter': ((1, 8, 3, 3), 0),
    'one weight': ((1, 1), 0),
}


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_values_and_gradients_are_those_of_the_formula(
    kind: str, granularity: str, name: str
) -> None:
    shape, axis = SHAPES[kind]
    upstream = random_tensor((shape[axis] if granularity == 'filter' else 1,), seed=3)
    leaves = [random_tensor(shape), 0.8 * random_tensor(shape) + 0.3 * random_tensor(shape, 1)]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    singles = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = reference(name, doubles[0], doubles[1], granularity, axis)
    values = regularize(name, [power_sums(singles[0], singles[1], axis)], granularity)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
    (expected * upstream.double()).sum().backward()
    (values * upstream).sum().backward()
    for single, double in zip(singles, doubles, strict=True):
        assert single.grad is not None and double.grad is not None
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize('name', ['cosine', 'l2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_compared_in_fp32(name: str, dtype: torch.dtype) -> None:
    w, other = random_tensor((64, 64)).to(dtype), random_tensor((64, 64), 1).to(dtype)
    values = regularize(name, [power_sums(w, other)])
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), reference(name, w, other, 'layer', 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_none_is_zero_and_has_no_graph(granularity: str) -> None:
    w = random_tensor((4, 8)).requires_grad_()
    values = regularize('none', [power_sums(w, w * 2)], granularity)
    assert values.tolist() == [0.0] * (1 if granularity == 'layer' else 4)
    assert not values.requires_grad


@pytest.mark.parametrize('scale', [1e-9, 1e-4, 1e4, 1e9])
def test_the_cosine_does_not_know_the_scale(scale: float) -> None:
    """Weights of a dead filter shrink for many epochs; squares of norms leave fp32 early."""
    w, other = random_tensor((4, 50)), random_tensor((4, 50)) + random_tensor((4, 50), 1)
    expected = cosine_distance(w, other, 'filter')
    torch.testing.assert_close(cosine_distance(w * scale, other * scale, 'filter'), expected)
    torch.testing.assert_close(cosine_distance(w, other * scale, 'filter'), expected)
    torch.testing.assert_close(cosine(w * scale, other * scale), cosine(w, other))


def test_the_cosine_of_equal_directions_is_zero_distance() -> None:
    w = random_tensor((4, 8))
    assert cosine_distance(w, 0.5 * w).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(w, -w).item() == pytest.approx(2, abs=1e-6)
    assert relative_l2(w, 0.5 * w).item() == pytest.approx(0.25)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float64, 12, elements=st.floats(-5, 5)),
    hnp.arrays(np.float64, 12, elements=st.floats(-5, 5)),
)
def test_l2_is_twice_the_cosine_distance_where_norms_are_equal(
    first: np.ndarray, second: np.ndarray
) -> None:
    """|w - w'|^2 = 2 |w|^2 (1 - cos) if |w'| = |w|."""
    if min(np.linalg.norm(first), np.linalg.norm(second)) < 1e-3:
        return
    w = torch.from_numpy(first)
    compressed = torch.from_numpy(second * np.linalg.norm(first) / np.linalg.norm(second))
    torch.testing.assert_close(
        relative_l2(w, compressed), 2 * cosine_distance(w, compressed), rtol=1e-4, atol=1e-5
    )


def test_l2_is_no_bound_on_the_cosine_for_other_norms() -> None:
    """The poster's "<=" fails: half of w has no angle to w, but a distance."""
    w = random_tensor((4, 8))
    assert relative_l2(w, w / 2).item() > 2 * cosine_distance(w, w / 2).item() + 0.2


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_zero_weights_cost_nothing_and_have_no_gradient(name: str, granularity: str) -> None:
    w = random_tensor((3, 8))
    w[1] = 0
    for weight in (w, torch.zeros(3, 8)):
        latent = weight.clone().requires_grad_()
        compressed = weight.clone().requires_grad_()
        values = regularize(name, [power_sums(latent, compressed)], granularity)
        values.sum().backward()
        zero_rows = (weight == 0).all(1)
        if granularity == 'filter':
            assert (values[zero_rows] == 0).all()
        for leaf in (latent, compressed):
            assert leaf.grad is not None and leaf.grad.isfinite().all()
            if granularity == 'filter':
                assert (leaf.grad[zero_rows] == 0).all()


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_a_filter_that_rounds_to_zero_has_no_direction_to_turn(granularity: str) -> None:
    """With one step per tensor and few bits a small filter may lose all its weights."""
    latent = random_tensor((2, 8)).requires_grad_()
    compressed = torch.zeros(2, 8, requires_grad=True)
    values = cosine_distance(latent, compressed, granularity)
    assert (values == 1).all()
    values.sum().backward()
    for leaf in (latent, compressed):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_descent_on_the_regularizer_aligns_a_tensor(name: str, granularity: str) -> None:
    """A few steps on the ungarnished formula, towards a fixed target."""
    target = random_tensor((4, 32), 1)
    w = random_tensor((4, 32)).requires_grad_()
    cosines = [float(cosine(w, target))]
    for _ in range(5):
        loss = regularize(name, [power_sums(w, target)], granularity).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= 0.5 * gradient / gradient.norm() * w.norm() * 0.1
        cosines.append(float(cosine(w, target)))
    assert cosines == sorted(cosines)
    assert cosines[-1] > cosines[0] + 0.02


@pytest.mark.parametrize('name', ['cosin', 'L2', '', None, ['cosine']])
def test_unknown_regularizers_are_refused(name: object) -> None:
    with pytest.raises(RecipeError, match=r"regularizer type=.*\['cosine', 'l2', 'none'\]"):
        check_regularizer(name)  # type: ignore[arg-type]


@pytest.mark.parametrize('granularity', ['layers', 'channel', None])
def test_unknown_granularities_are_refused(granularity: object) -> None:
    with pytest.raises(RecipeError, match=r"granularity=.*\['layer', 'filter'\]"):
        check_regularizer('cosine', granularity)  # type: ignore[arg-type]


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="nearest: 'cosine'"):
        check_regularizer('cosin')
