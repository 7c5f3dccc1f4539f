"""Quantized inputs: how their range is calibrated, learned and observed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import compress
from torch import nn

import slope_mm


def activation_layer(bits: int = 4) -> Any:
    """A layer whose weight is its identity, so that its output is its quantized input."""
    layer = compress(nn.Linear(4, 4, bias=False), dict(weight={}, activation=dict(bits=bits)))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    return layer


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('signed', [False, True])
def test_the_first_training_batch_calibrates_range_and_sign(bits: int, signed: bool) -> None:
    layer = activation_layer(bits)
    x = torch.randn(500, 4)
    x = x if signed else x.relu()
    assert not layer.calibrated and layer.activation_signed is None
    y = layer(x)
    assert layer.calibrated and layer.activation_signed is signed
    assert int(layer.slope_act_signed) == int(signed)
    step = layer.slope_act_step.item()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = np.clip(np.rint(x.numpy() / np.float32(step)), low, high) * np.float32(step)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6)
    # The step is a good one: no clip range of a fine grid is much better.
    errors = []
    for share in np.linspace(0.02, 1.1, 150):
        s = share * float(x.abs().max()) / high
        errors.append(
            float(((np.clip(np.rint(x.numpy() / s), low, high) * s - x.numpy()) ** 2).mean())
        )
    assert float((y - x).detach().square().mean()) <= 1.25 * min(errors)


def test_a_calibrated_range_is_kept() -> None:
    layer = activation_layer()
    layer(torch.rand(50, 4))
    step = layer.slope_act_step.item()
    layer(100 * torch.randn(50, 4))
    assert layer.slope_act_step.item() == step and layer.activation_signed is False


def test_an_uncalibrated_layer_passes_inputs_through_in_evaluation() -> None:
    layer, x = activation_layer().eval(), torch.randn(5, 4)
    assert torch.equal(layer(x), x)
    assert not layer.calibrated


def test_empty_inputs_neither_calibrate_nor_fail() -> None:
    """No RoI in any image of the batch."""
    layer = activation_layer()
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    assert not layer.calibrated
    layer(torch.rand(9, 4))
    empty = torch.zeros(0, 4, requires_grad=True)
    layer(empty).sum().backward()
    assert layer.slope_act_step.grad.item() == 0


def test_the_input_step_learns_by_lsq() -> None:
    """Scaled by the features of one sample: losses are means over the batch."""
    layer = activation_layer()
    layer(torch.randn(50, 4))
    x, upstream = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    with torch.no_grad():
        layer.slope_act_step.fill_(0.2)
    layer(x).backward(upstream)
    v = x / 0.2
    slope = torch.where((v > -8) & (v < 7), v.round() - v, v.clamp(-8, 7))
    expected = (upstream * slope).sum() / math.sqrt(5 * 4 * 7)
    assert layer.slope_act_step.grad.item() == pytest.approx(expected.item(), rel=1e-3)


def test_observing_passes_inputs_through_and_gathers_them() -> None:
    layer = activation_layer()
    layer.begin_observing()
    first, second = torch.rand(30, 4), torch.rand(20, 4) - 0.5
    assert torch.equal(layer(first), first)
    layer(torch.zeros(0, 4))
    layer(second)
    assert not layer.calibrated
    (observer,) = layer.end_observing()
    assert observer.seen
    assert observer.low.item() == min(first.min().item(), second.min().item())
    seen = set(torch.cat(observer.samples).tolist())
    assert seen == set(torch.cat([first, second]).flatten().tolist())
    layer.set_activation_range(torch.cat(observer.samples), signed=True)
    assert layer.calibrated and layer.activation_signed is True


def test_an_observer_samples_large_inputs_and_stays_small() -> None:
    layer = activation_layer()
    layer.begin_observing()
    for _ in range(20):
        layer(torch.rand(4000, 4))
    layer(torch.full((1, 4), -3.0))
    (observer,) = layer.end_observing()
    assert torch.cat(observer.samples).numel() <= 20_000
    # The sign is never missed, however late the negative values come.
    assert observer.low.item() == -3


def test_weights_at_full_precision_are_used_as_they_are() -> None:
    layer = compress(nn.Linear(8, 4), dict(weight={}, activation=dict(bits=4))).eval()
    assert not layer.changes_weight
    assert torch.equal(layer.compressed_weight(), layer.weight)
    assert 'slope_step' not in layer.state_dict()


def test_layers_of_other_bits_have_no_input_quantizer() -> None:
    layer = compress(nn.Linear(8, 4))
    assert layer.calibrated and layer.activation_signed is None
    assert set(layer.state_dict()) == {'weight', 'bias', 'slope_step', 'slope_layer'}


def test_runs_count_forwards_for_training() -> None:
    layer, x = compress(nn.Linear(8, 4)), torch.randn(2, 8)
    layer(x)
    layer(x)
    assert layer.runs == 2
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert layer.runs == 2


def test_an_input_of_zeros_alone_calibrates_nothing() -> None:
    layer = slope_mm.convert(
        nn.Sequential(nn.Linear(8, 4)), dict(weight=dict(bits=4), activation=dict(bits=4))
    )[0]
    layer.train()
    layer(torch.zeros(2, 8))
    assert not layer.calibrated
    layer(torch.rand(2, 8))
    assert layer.calibrated and float(layer.slope_act_step) > 1e-3
