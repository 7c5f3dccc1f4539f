"""Quantization: codes against loops, step gradients against the paper and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from weight_cases import ALL_CODES, BITS, WEIGHTS, levels, random_tensor

from slope_mm.errors import RecipeError
from slope_mm.ops import (
    CODE_SETS,
    SMALLEST_STEP,
    Codes,
    activation_codes,
    check_bits,
    from_codes,
    grad_scale,
    lsq_quantize,
    positive,
    step_shape,
    to_codes,
    weight_codes,
)


def random_steps(shape: tuple[int, ...], axis: int | None, codes: Codes, seed: int = 1) -> Tensor:
    """Steps that put some of a normal distribution beyond the ends."""
    uniform = torch.rand(step_shape(shape, axis), generator=torch.Generator().manual_seed(seed))
    return (0.5 + uniform) * 1.5 / codes.largest


def slow_quantize(x: np.ndarray, step: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values, one number after the other, in fp32."""
    steps = np.broadcast_to(step, x.shape)
    integers = np.zeros(x.shape, dtype=np.int64)
    values = np.zeros(x.shape, dtype=np.float32)
    for index in np.ndindex(*x.shape):
        scaled = np.float32(x[index]) / np.float32(steps[index]) - np.float32(codes.offset)
        code = min(max(int(np.rint(scaled)), codes.qn), codes.qp)
        integers[index] = code
        values[index] = (np.float32(code) + np.float32(codes.offset)) * np.float32(steps[index])
    return integers, values


def published_step_derivative(v: float, codes: Codes) -> float:
    """LSQ (arXiv 1902.08153), equation 3, at ``v = x / s``."""
    low, high = codes.qn + codes.offset, codes.qp + codes.offset
    if v <= low:
        return low
    if v >= high:
        return high
    return float(np.rint(v - codes.offset)) + codes.offset - v


# --- code sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_the_code_sets_are_the_designs(name: str, bits: int) -> None:
    codes = weight_codes(name, bits)
    assert codes.bits == bits
    assert [k + codes.offset for k in range(codes.qn, codes.qp + 1)] == levels(name, bits)
    assert codes.largest == max(levels(name, bits))


@pytest.mark.parametrize('bits', BITS)
def test_sets_that_negation_and_zero_belong_to(bits: int) -> None:
    for name in ('symmetric', 'odd'):
        assert sorted(-level for level in levels(name, bits)) == levels(name, bits)
    x = torch.cat([random_tensor((200,)), torch.zeros(1)])
    codes = weight_codes('odd', bits)
    assert (lsq_quantize(x, torch.tensor([0.3]), codes.qn, codes.qp, offset=0.5) != 0).all()
    assert 0.0 in levels('lsq', bits)
    assert 0.0 in levels('symmetric', bits)


@pytest.mark.parametrize('bits', BITS)
def test_activation_codes(bits: int) -> None:
    unsigned, signed = activation_codes(bits, signed=False), activation_codes(bits, signed=True)
    assert (unsigned.qn, unsigned.qp, unsigned.bits) == (0, 2**bits - 1, bits)
    assert (signed.qn, signed.qp) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 4.0, '4', None, True])
def test_impossible_bits_are_refused(bits: object) -> None:
    with pytest.raises(RecipeError, match=r'stem bits=.*integer from 2 to 8, or None'):
        check_bits(bits, 'stem')


@pytest.mark.parametrize('name', ['LSQ', 'lsqq', 'symetric', '', None, ['lsq']])
def test_unknown_code_sets_are_refused(name: object) -> None:
    with pytest.raises(RecipeError, match=r"choose one of \['lsq', 'odd', 'symmetric'\]"):
        weight_codes(name, 4)  # type: ignore[arg-type]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_codes_and_values_are_the_definition(
    kind: str, per_channel: bool, name: str, bits: int
) -> None:
    shape, axis = WEIGHTS[kind]
    codes = weight_codes(name, bits)
    w = random_tensor(shape)
    step = random_steps(shape, axis if per_channel else None, codes)
    integers, values = slow_quantize(w.numpy(), step.numpy(), codes)
    result = lsq_quantize(w, step, codes.qn, codes.qp, offset=codes.offset)
    np.testing.assert_array_equal(to_codes(w, step, codes).numpy(), integers)
    np.testing.assert_array_equal(result.numpy(), values)
    np.testing.assert_array_equal(
        from_codes(torch.from_numpy(integers).float(), step, codes).numpy(), values
    )
    # No level is nearer, whatever formula found this one.
    grid = np.array(levels(name, bits)) * np.broadcast_to(step.numpy(), shape)[..., None]
    nearest = np.abs(w.numpy()[..., None] - grid).min(-1)
    np.testing.assert_allclose(np.abs(w.numpy() - values), nearest, rtol=1e-4, atol=1e-6)


def test_halves_round_to_the_even_code() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    step = torch.tensor([0.25])
    assert (lsq_quantize(x * 0.25, step, -8, 7) / 0.25).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize('name', CODE_SETS)
def test_values_beyond_the_ends_are_clipped(name: str) -> None:
    codes = weight_codes(name, 3)
    x = torch.tensor([-1e30, -math.inf, 1e30, math.inf])
    values = lsq_quantize(x, torch.tensor([0.5]), codes.qn, codes.qp, offset=codes.offset)
    low, high = min(levels(name, 3)) / 2, max(levels(name, 3)) / 2
    assert values.tolist() == [low, low, high, high]


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-9, 9, width=32)
    ),
    st.floats(0.015625, 4, width=32),
    st.sampled_from(ALL_CODES),
)
def test_quantizing_twice_is_quantizing_once(
    array: np.ndarray, step: float, code_set: tuple[str, int]
) -> None:
    codes, s = weight_codes(*code_set), torch.tensor([step])
    once = lsq_quantize(torch.from_numpy(array), s, codes.qn, codes.qp, offset=codes.offset)
    twice = lsq_quantize(once, s, codes.qn, codes.qp, offset=codes.offset)
    assert torch.equal(once, twice)
    assert len(torch.unique(once)) <= 2 ** code_set[1]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', [(), (1,), (8, 1)])
def test_low_precision_keeps_its_dtype_and_computes_in_fp32(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Also with a step of no dimensions, which torch's type promotion does not count."""
    codes = weight_codes('lsq', 8)
    x = random_tensor((8, 500)).to(dtype).requires_grad_()
    step = torch.full(shape, 0.0137, requires_grad=True)
    result = lsq_quantize(x, step, codes.qn, codes.qp)
    _, values = slow_quantize(x.detach().float().numpy(), step.detach().numpy(), codes)
    assert result.dtype == dtype
    assert torch.equal(result, torch.from_numpy(values).to(dtype))
    result.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert step.grad is not None and step.grad.dtype == torch.float32
    assert step.grad.shape == step.shape


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize(('name', 'bits'), [(n, b) for n in CODE_SETS for b in (2, 4, 8)])
def test_gradients_are_the_published_ones(
    kind: str, per_channel: bool, name: str, bits: int
) -> None:
    shape, axis = WEIGHTS[kind]
    codes = weight_codes(name, bits)
    x = random_tensor(shape).requires_grad_()
    step = random_steps(shape, axis if per_channel else None, codes).requires_grad_()
    upstream, scale = random_tensor(shape, seed=2), 0.37
    lsq_quantize(x, step, codes.qn, codes.qp, scale, codes.offset).backward(upstream)

    expected_step = np.zeros(step.shape)
    expected_x = np.zeros(shape)
    for index in np.ndindex(*shape):
        where = tuple(i if size > 1 else 0 for i, size in zip(index, step.shape, strict=True))
        v = x[index].item() / step[where].item()
        g = upstream[index].item()
        expected_step[where] += scale * g * published_step_derivative(v, codes)
        inside = codes.qn + codes.offset < v < codes.qp + codes.offset
        expected_x[index] = g if inside else 0.0
    assert x.grad is not None and step.grad is not None
    np.testing.assert_allclose(step.grad.numpy(), expected_step, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(x.grad.numpy(), expected_x, rtol=1e-6)
    assert 0 < (expected_x == 0).sum() < x.numel() or bits == 8


def unrounded(x: np.ndarray, step: float, rounding: np.ndarray, codes: Codes) -> np.ndarray:
    """What the straight-through estimator differentiates: rounding as a constant added to v.

    round(clip(v)) = clip(v) + rounding, with v = x / s - offset. Inside the clip range the value
    is x + rounding * s, beyond its ends qn * s or qp * s (with the offset).
    """
    return (np.clip(x / step - codes.offset, codes.qn, codes.qp) + rounding + codes.offset) * step


@pytest.mark.parametrize(('name', 'bits'), ALL_CODES)
def test_gradients_are_finite_differences_of_the_unrounded_quantizer(name: str, bits: int) -> None:
    codes = weight_codes(name, bits)
    step = 1.25 / codes.largest
    x = random_tensor((400,)).double()
    v = x.numpy() / step - codes.offset
    # Differences across a corner of clip() are no derivatives.
    x = x[torch.from_numpy(np.minimum(abs(v - codes.qn), abs(v - codes.qp)) > 0.02)]
    clipped = np.clip(x.numpy() / step - codes.offset, codes.qn, codes.qp)
    rounding = np.rint(clipped) - clipped
    upstream = np.random.default_rng(0).standard_normal(x.shape)

    def loss(values: np.ndarray, s: float) -> float:
        return float((upstream * unrounded(values, s, rounding, codes)).sum())

    inputs = x.clone().requires_grad_()
    learned = torch.tensor([step], dtype=torch.float64, requires_grad=True)
    lsq_quantize(inputs, learned, codes.qn, codes.qp, offset=codes.offset).backward(
        torch.from_numpy(upstream)
    )
    assert inputs.grad is not None and learned.grad is not None
    h = 1e-4 * step
    by_step = (loss(x.numpy(), step + h) - loss(x.numpy(), step - h)) / (2 * h)
    # The step is rounded to fp32 on its way.
    assert learned.grad.item() == pytest.approx(by_step, rel=1e-4, abs=1e-3)
    for i in range(0, len(x), 17):
        up, down = x.numpy().copy(), x.numpy().copy()
        up[i] += h
        down[i] -= h
        by_x = (loss(up, step) - loss(down, step)) / (2 * h)
        assert inputs.grad[i].item() == pytest.approx(by_x, rel=1e-5, abs=1e-5)


def test_unsigned_zeros_get_no_gradient() -> None:
    """After ReLU: zero is the lower end of the range."""
    x = torch.tensor([0.0, 0.3, 5.0], requires_grad=True)
    lsq_quantize(x, torch.tensor([0.25]), 0, 15).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize('name', CODE_SETS)
def test_a_negative_step_quantizes_as_its_magnitude_and_learns_its_way_back(name: str) -> None:
    codes = weight_codes(name, 4)
    x = random_tensor((300,))
    gradients, results = [], []
    for sign in (1.0, -1.0):
        step = torch.tensor([0.2 * sign], requires_grad=True)
        result = lsq_quantize(x, step, codes.qn, codes.qp, offset=codes.offset)
        result.square().sum().backward()
        assert step.grad is not None
        gradients.append(step.grad.item())
        results.append(result.detach())
    assert torch.equal(*results)
    assert gradients[0] == -gradients[1] != 0


@pytest.mark.parametrize('step', [0.0, -0.0, 1e-30, -1e-30])
def test_a_step_of_zero_is_kept_positive(step: float) -> None:
    learned = torch.tensor([step], requires_grad=True)
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    assert positive(learned).item() == pytest.approx(SMALLEST_STEP)
    result = lsq_quantize(x, learned, -8, 7)
    result.sum().backward()
    torch.testing.assert_close(result.detach(), torch.tensor([-8.0, 0.0, 7.0]) * SMALLEST_STEP)
    assert learned.grad is not None and learned.grad.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()


def test_an_overflowed_input_leaves_a_finite_gradient() -> None:
    """fp16 activations may be infinite; they count as clipped."""
    step = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([math.inf, 1.1], dtype=torch.float16, requires_grad=True)
    lsq_quantize(x, step, 0, 15).sum().backward()
    assert step.grad is not None and x.grad is not None
    assert step.grad.item() == pytest.approx(15 + (2 - 2.2), abs=1e-3)
    assert x.grad.tolist() == [0.0, 1.0]


def test_backward_keeps_the_input_and_the_step_alone() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = random_tensor((64, 32)).requires_grad_()
    step = torch.full((1,), 0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lsq_quantize(x, step, -8, 7)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, step)}


def test_frozen_inputs_and_frozen_steps_get_no_gradient() -> None:
    x, step = random_tensor((8, 4)), torch.tensor([[0.1]])
    lsq_quantize(x, step.requires_grad_(), -8, 7).sum().backward()
    assert x.grad is None and step.grad is not None
    x, step = random_tensor((8, 4)), torch.tensor([[0.1]])
    lsq_quantize(x.requires_grad_(), step, -8, 7).sum().backward()
    assert x.grad is not None and step.grad is None


def test_grad_scale_is_the_papers() -> None:
    assert grad_scale(1152, weight_codes('lsq', 4)) == pytest.approx(1 / math.sqrt(1152 * 7))
    assert grad_scale(0, activation_codes(4, signed=False)) == pytest.approx(1 / math.sqrt(15))
