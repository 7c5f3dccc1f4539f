"""Mask and quantize in one operation: gradients against closed forms and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress_cases import WEIGHTS, clip_range, random_tensor, slow_nm, steps_for

from slope_mm.ops import (
    CODE_SETS,
    GRADIENTS,
    SR_STE_DECAY,
    NMPattern,
    compress_weight,
    compress_with_powers,
    nm_mask,
    step_shape,
    weight_codes,
)


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('sparse', [True, False])
@pytest.mark.parametrize('name', [None, *CODE_SETS])
def test_gradients_are_the_closed_forms(
    kind: str, gradient: str, sparse: bool, name: str | None
) -> None:
    """One weight after the other.

    STE: identity, but not beyond the clip range of a kept weight (a pruned one enters the
    quantizer as zero). SR-STE adds ``decay * w`` where pruned; ``masked`` gives nothing there, nor
    does ``soft`` under a mask that is given.
    The step gets LSQ's derivative of the kept weights alone.
    """
    shape, input_axis, output_axis = WEIGHTS[kind]
    w = random_tensor(shape).requires_grad_()
    upstream = random_tensor(shape, seed=2)
    mask = nm_mask(w, 2, 4, input_axis) if sparse else None
    codes = None if name is None else weight_codes(name, 3)
    step = None if codes is None else steps_for(shape, output_axis, codes).requires_grad_()
    scale, decay = 0.21, 0.03
    compress_weight(
        w, step, mask, codes, grad_scale=scale, gradient=gradient, decay=decay
    ).backward(upstream)

    expected_w = np.zeros(shape)
    expected_step = np.zeros(step_shape(shape, output_axis))
    for index in np.ndindex(*shape):
        g, kept = upstream[index].item(), mask is None or bool(mask[index])
        inside = True
        if kept and codes is not None and step is not None:
            channel = tuple(index[i] if i == output_axis else 0 for i in range(len(shape)))
            v, (low, high) = w[index].item() / step[channel].item(), clip_range(codes)
            inside = low < v < high
            rounded = float(np.rint(v - codes.offset)) + codes.offset
            d_step = rounded - v if inside else max(low, min(high, v))
            expected_step[channel] += scale * g * d_step
        if kept:
            expected_w[index] = g if inside else 0.0
        elif gradient not in ('masked', 'soft'):
            expected_w[index] = g + (decay * w[index].item() if gradient == 'sr_ste' else 0.0)
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), expected_w, rtol=1e-5, atol=1e-6)
    if step is not None:
        assert step.grad is not None and step.grad.shape == step.shape
        np.testing.assert_allclose(step.grad.numpy(), expected_step, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 4), (2, 8)])
@pytest.mark.parametrize('name', [None, 'lsq'])
def test_the_soft_gradient_is_that_of_a_sigmoid_around_the_groups_threshold(
    kind: str, n: int, m: int, name: str | None
) -> None:
    """Group by group: autograd through ``w * sigmoid((|w| - t) / T)`` with t and T held fixed."""
    shape, input_axis, output_axis = WEIGHTS[kind]
    w, upstream = random_tensor(shape).requires_grad_(), random_tensor(shape, seed=2)
    codes = None if name is None else weight_codes(name, 3)
    step = None if codes is None else steps_for(shape, output_axis, codes)
    settings = dict(pattern=NMPattern(n, m), axes=(output_axis, input_axis))
    gradients = {}
    for gradient in ('soft', 'ste'):
        w.grad = None
        compress_with_powers(w, step, codes, gradient=gradient, **settings)[0].backward(upstream)
        assert w.grad is not None
        gradients[gradient] = w.grad.clone()

    latent = w.detach().movedim(input_axis, -1)
    # What comes through the quantizer is the straight-through gradient; the mask's part follows.
    arriving = gradients['ste'].movedim(input_axis, -1)
    expected = torch.zeros_like(latent)
    for place in np.ndindex(*latent.shape[:-1]):
        for first in range(0, latent.shape[-1], m):
            part = slice(first, first + m)
            group = latent[place][part].double().requires_grad_()
            ranked = group.detach().abs().sort(descending=True).values
            t = (ranked[n - 1] + ranked[n]) / 2
            soft = group * ((group.abs() - t) / (0.25 * t)).sigmoid()
            soft.backward(arriving[place][part].double())
            assert group.grad is not None
            expected[place][part] = group.grad.float()
    found = gradients['soft'].movedim(input_axis, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_soft_gradient_of_zeros_is_straight_through() -> None:
    w = torch.zeros(4, 8, requires_grad=True)
    compress_with_powers(w, pattern=NMPattern(2, 4), gradient='soft')[0].sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.ones(4, 8))


@pytest.mark.parametrize('sparse', [True, False])
@pytest.mark.parametrize('name', CODE_SETS)
def test_gradients_are_finite_differences_of_the_unrounded_operation(
    name: str, sparse: bool
) -> None:
    """In double precision, with the mask and what rounding added held fixed.

    ``S`` is the identity to the straight-through estimator (a pruned weight moves the result as
    if it were let through), hence the added ``(w - w0)`` where pruned.
    """
    codes = weight_codes(name, 3)
    low, high = clip_range(codes)
    w0 = random_tensor((12, 16)).double().numpy()
    # Steps that fp32 holds exactly: the operation computes with fp32 steps.
    s0 = np.float32(steps_for((12, 16), 0, codes).numpy()).astype(np.float64)
    mask = slow_nm(w0, 2, 4, 1) if sparse else np.ones(w0.shape, dtype=bool)
    corners = np.minimum(abs(w0 / s0 - low), abs(w0 / s0 - high)) < 1e-3
    w0[corners & mask] *= 1.01
    clipped = np.clip(w0 / s0, low, high)
    rounding = np.rint(clipped - codes.offset) + codes.offset - clipped
    upstream = np.random.default_rng(0).standard_normal(w0.shape)

    def loss(w: np.ndarray, s: np.ndarray) -> float:
        quantized = (np.clip(w / s, low, high) + rounding) * s
        return float((upstream * np.where(mask, quantized, w - w0)).sum())

    w = torch.from_numpy(w0).requires_grad_()
    step = torch.from_numpy(s0).requires_grad_()
    compress_weight(w, step, torch.from_numpy(mask) if sparse else None, codes).backward(
        torch.from_numpy(upstream)
    )
    assert w.grad is not None and step.grad is not None
    h = 1e-6
    for channel in range(12):
        up, down = s0.copy(), s0.copy()
        up[channel] += h
        down[channel] -= h
        by_step = (loss(w0, up) - loss(w0, down)) / (2 * h)
        assert step.grad[channel].item() == pytest.approx(by_step, rel=1e-4, abs=1e-4)
        for k in range(16):
            more, less = w0.copy(), w0.copy()
            more[channel, k] += h
            less[channel, k] -= h
            by_w = (loss(more, s0) - loss(less, s0)) / (2 * h)
            assert w.grad[channel, k].item() == pytest.approx(by_w, rel=1e-5, abs=1e-5)


def test_pruned_weights_can_come_back_under_ste() -> None:
    w = torch.tensor([[1.0, 0.9, 0.8, 0.7]], requires_grad=True)
    for _ in range(10):
        mask = nm_mask(w, 2, 4)
        loss = compress_weight(w, mask=mask)[0, 3].neg()
        (gradient,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= 0.05 * gradient
    assert nm_mask(w, 2, 4)[0, 3]


def test_sr_ste_decays_by_its_papers_factor_unless_told() -> None:
    assert SR_STE_DECAY == 2e-4
    w = random_tensor((4, 8)).requires_grad_()
    mask = nm_mask(w, 2, 4)
    compress_weight(w, mask=mask, gradient='sr_ste').backward(torch.zeros(4, 8))
    assert w.grad is not None
    torch.testing.assert_close(w.grad, torch.where(mask, 0.0, 2e-4 * w.detach()))


def test_a_negative_step_counts_as_its_magnitude() -> None:
    codes, w = weight_codes('lsq', 4), random_tensor((4, 8))
    steps = [torch.full((4, 1), sign * 0.15, requires_grad=True) for sign in (1.0, -1.0)]
    results = [compress_weight(w, step, None, codes) for step in steps]
    assert torch.equal(*results)
    for result in results:
        result.square().sum().backward()
    assert steps[0].grad is not None and steps[1].grad is not None
    assert torch.equal(steps[0].grad, -steps[1].grad)


def test_codes_without_a_step_do_not_quantize() -> None:
    w, codes = random_tensor((4, 8)).requires_grad_(), weight_codes('lsq', 4)
    compressed = compress_weight(w, None, None, codes)
    compressed.sum().backward()
    assert torch.equal(compressed, w)
    assert w.grad is not None and torch.equal(w.grad, torch.ones(4, 8))
