"""First steps: LSQ's against the paper, searched ones against the best there is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from weight_cases import ALL_CODES, WEIGHTS, levels, random_tensor

from slope_mm.ops import (
    CODE_SETS,
    Codes,
    activation_codes,
    from_codes,
    lsq_init_step,
    mse_init_step,
    nm_mask,
    step_shape,
    to_codes,
    weight_codes,
)


def squared_error(w: Tensor, step: Tensor, codes: Codes, mask: Tensor | None, axis: int) -> Tensor:
    """Per channel, over kept weights, in double precision."""
    error = (from_codes(to_codes(w, step, codes), step, codes) - w).double().square()
    if mask is not None:
        error = error * mask
    return error.movedim(axis, 0).flatten(1).sum(1)


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('name', CODE_SETS)
def test_the_lsq_start_is_the_papers_over_kept_weights(kind: str, sparse: bool, name: str) -> None:
    shape, axis = WEIGHTS[kind]
    codes, w = weight_codes(name, 4), random_tensor(shape)
    mask = nm_mask(w, 2, 4, dim=1 - axis) if sparse else None
    kept = np.ones(shape, dtype=bool) if mask is None else mask.numpy()
    step = lsq_init_step(w, codes, axis, mask)
    assert step.dtype == torch.float32
    assert step.shape == step_shape(shape, axis)
    for channel in range(shape[axis]):
        values = np.take(w.numpy(), channel, axis)[np.take(kept, channel, axis)]
        expected = 2 * np.abs(values).mean() / math.sqrt(max(levels(name, 4)))
        assert step.flatten()[channel].item() == pytest.approx(expected, rel=1e-5)
    whole = lsq_init_step(w, codes, None, mask)
    assert whole.shape == (1,) * w.dim()
    expected = 2 * np.abs(w.numpy()[kept]).mean() / math.sqrt(max(levels(name, 4)))
    assert whole.item() == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 24).map(lambda n: 4 * n)),
        elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 64.0]),
    ),
    st.sampled_from(ALL_CODES),
    st.booleans(),
)
def test_the_searched_start_is_never_worse_than_the_lsq_start(
    array: np.ndarray, code_set: tuple[str, int], sparse: bool
) -> None:
    w, codes = torch.from_numpy(array), weight_codes(*code_set)
    mask = nm_mask(w, 2, 4) if sparse else None
    searched, start = (
        squared_error(w, init(w, codes, 0, mask), codes, mask, 0)
        for init in (mse_init_step, lsq_init_step)
    )
    assert (searched <= start * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_the_searched_start_is_never_worse_on_heavy_tails(name: str, bits: int) -> None:
    """Where a grid of clip ranges is too coarse on its own: few weights, or outliers."""
    codes = weight_codes(name, bits)
    torch.manual_seed(0)
    for size in (2, 4, 16, 64, 1500):
        laplace = torch.randn(200, size).sign() * torch.empty(200, size).exponential_()
        outliers = torch.distributions.StudentT(2.0).sample((200, size))
        for w in (laplace, outliers, laplace * (torch.rand(200, size) < 0.1)):
            searched, start = (
                squared_error(w, init(w, codes), codes, None, 0)
                for init in (mse_init_step, lsq_init_step)
            )
            assert (searched <= start * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_the_searched_start_is_near_the_best_there_is(name: str, bits: int) -> None:
    """Against all clip ranges from 2 % to 120 % of the maximum."""
    codes, w = weight_codes(name, bits), random_tensor((6, 16, 3, 3))
    found = squared_error(w, mse_init_step(w, codes, 0), codes, None, 0)
    largest = w.abs().amax((1, 2, 3), keepdim=True)
    errors = [
        squared_error(w, largest * share / codes.largest, codes, None, 0)
        for share in np.linspace(0.02, 1.2, 600).tolist()
    ]
    # Within 1 dB.
    assert (found <= 1.25 * torch.stack(errors).amin(0)).all()


@settings(deadline=None, max_examples=80)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 20)),
        elements=st.floats(0.5, 4, width=32),
    ),
    st.sampled_from(ALL_CODES),
    st.integers(-8, 8),
)
def test_first_steps_scale_with_the_weights(
    array: np.ndarray, code_set: tuple[str, int], exponent: int
) -> None:
    w, codes, factor = torch.from_numpy(array), weight_codes(*code_set), 2.0**exponent
    for init in (mse_init_step, lsq_init_step):
        torch.testing.assert_close(
            init(w * factor, codes), init(w, codes) * factor, rtol=1e-6, atol=0
        )
        torch.testing.assert_close(init(w * factor, codes, None), init(w, codes, None) * factor)


def test_a_channels_step_depends_on_its_own_weights_alone() -> None:
    codes, w = weight_codes('lsq', 4), random_tensor((4, 6, 3, 3))
    changed = w.clone()
    changed[:, 2] *= 100
    before, after = mse_init_step(w, codes, axis=1), mse_init_step(changed, codes, axis=1)
    assert before.shape == (1, 6, 1, 1)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(before[:, others], after[:, others])
    assert after[0, 2, 0, 0] > 50 * before[0, 2, 0, 0]


def test_masked_weights_do_not_count() -> None:
    codes, w = weight_codes('lsq', 4), random_tensor((4, 8))
    mask = nm_mask(w, 2, 4)
    other = torch.where(mask, w, w * 0.3)
    for init in (mse_init_step, lsq_init_step):
        assert torch.equal(init(w, codes, 0, mask), init(other, codes, 0, mask))


@pytest.mark.parametrize('init', [mse_init_step, lsq_init_step])
@pytest.mark.parametrize('name', CODE_SETS)
@pytest.mark.parametrize('axis', [0, 1, None])
def test_zero_weights_have_positive_steps(
    init: Callable[..., Tensor], name: str, axis: int | None
) -> None:
    codes = weight_codes(name, 4)
    w = random_tensor((4, 4))
    w[1] = 0
    for weight in (w, torch.zeros(4, 4)):
        step = init(weight, codes, axis)
        assert step.isfinite().all() and (step > 0).all()
        assert from_codes(to_codes(weight, step, codes), step, codes).isfinite().all()


@pytest.mark.parametrize('value', [0.7, -0.7, 1e-3, 1e4])
@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_constant_weights_are_met_exactly(value: float, name: str, bits: int) -> None:
    codes, w = weight_codes(name, bits), torch.full((3, 8, 1, 1), value)
    step = mse_init_step(w, codes)
    torch.testing.assert_close(from_codes(to_codes(w, step, codes), step, codes), w)


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (1, 1), (1, 4, 3, 3), (4, 1, 3, 3), (1, 9)])
@pytest.mark.parametrize('axis', [0, 1])
def test_layers_of_one_channel(shape: tuple[int, ...], axis: int) -> None:
    codes, w = weight_codes('lsq', 4), random_tensor(shape)
    for init in (mse_init_step, lsq_init_step):
        step = init(w, codes, axis)
        assert step.shape == step_shape(shape, axis)
        assert (step > 0).all()


@pytest.mark.parametrize('axis', [0, None])
def test_the_search_looks_at_every_kernel_position(axis: int | None) -> None:
    """Large weights are sampled; a trained kernel's centre is heavier than its corners."""
    codes = weight_codes('lsq', 4)
    w = random_tensor((2, 1024, 3, 3)) * 0.02
    w[:, :, 1, 1] *= 50
    step = mse_init_step(w, codes, axis)
    largest = w.abs().amax() if axis is None else w.abs().amax((1, 2, 3), keepdim=True)
    errors = [
        squared_error(w, (largest * share / codes.largest).reshape(step.shape), codes, None, 0)
        for share in np.linspace(0.02, 1.2, 200).tolist()
    ]
    best = torch.stack([e.sum().reshape(1) if axis is None else e for e in errors]).amin(0)
    found = squared_error(w, step, codes, None, 0)
    assert ((found.sum() if axis is None else found) <= 1.1 * best).all()


def test_low_precision_weights_have_fp32_steps() -> None:
    w = random_tensor((4, 8)).to(torch.bfloat16)
    for init in (mse_init_step, lsq_init_step):
        assert init(w, weight_codes('lsq', 4)).dtype == torch.float32


def test_empty_weights_have_steps() -> None:
    assert mse_init_step(torch.zeros(3, 0), weight_codes('lsq', 4)).shape == (3, 1)


@pytest.mark.parametrize('seed', range(8))
def test_few_large_values_decide_a_tensors_step(seed: int) -> None:
    """As in the input of a detector's last layer: nearly all is small, what matters is rare."""
    noise = torch.Generator().manual_seed(seed)
    values = 0.01 * torch.randn(16384, generator=noise).abs()
    values[torch.randperm(16384, generator=noise)[:24]] = 1 + torch.rand(24, generator=noise)
    codes = activation_codes(4, signed=False)
    found = squared_error(values[None], mse_init_step(values, codes, None), codes, None, 0)
    steps = np.linspace(1e-3, 0.2, 400)
    best = min(
        float(((np.clip(np.round(values.numpy() / s), 0, 15) * s - values.numpy()) ** 2).sum())
        for s in steps
    )
    assert float(found) <= 1.1 * best
