"""One input step for all runs of a layer against one for each, on a head with three levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.levels import each_run, level_steps, own_steps

SCALES = (1.0, 4.0, 0.25)
RECIPE = dict(weight=dict(sparsity=None, bits=8), activation=dict(bits=4), rules=[])


class Pyramid(nn.Module):
    """A layer for each level, and one that all levels share."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Three levels; the last one has negative values."""
        x = self.single(x).abs()
        return [self.shared(x * scale - (scale < 1) * scale) for scale in SCALES]


def levels(model: Pyramid, x: Tensor) -> list[Tensor]:
    """What ``shared`` is given, unquantized."""
    seen: list[Tensor] = []
    with each_run(model, lambda name, layer, run, x: seen.append(x) if name == 'shared' else None):
        model(x)
    return seen


@pytest.fixture
def model() -> Pyramid:
    torch.manual_seed(0)
    made = Pyramid()
    slope_mm.convert(made, RECIPE)
    # The input of `single` stays as it is, so that those of `shared` do not depend on its step.
    layer = made.shared
    x = torch.cat([x.flatten() for x in levels(made.eval(), images())])
    layer.set_activation_range(x.detach(), signed=True)
    return made


def images() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def quantized(x: np.ndarray, step: float, signed: bool) -> np.ndarray:
    low, high = (-8, 7) if signed else (0, 15)
    return np.clip(np.round(x / step), low, high) * step


def decibels(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * math.log10((x**2).sum() / ((x - y) ** 2).sum())


def test_a_level_is_judged_under_both_steps(model: Pyramid) -> None:
    found = level_steps(model, [lambda: model(images())])
    assert [(s.layer, s.level) for s in found] == [('shared', 0), ('shared', 1), ('shared', 2)]
    assert [s.signed for s in found] == [False, False, True]
    one = float(model.shared.slope_act_step.detach())
    for step, x in zip(found, levels(model, images()), strict=True):
        values = x.detach().numpy()
        assert step.one_db == pytest.approx(decibels(values, quantized(values, one, True)), abs=0.5)
        own = quantized(values, step.step, step.signed)
        assert step.own_db == pytest.approx(decibels(values, own), abs=0.5)
        assert step.own_db > step.one_db
    # What is calibrated on large values leaves nothing of the small ones.
    assert found[2].own_db - found[2].one_db > 10


def test_each_level_can_have_its_own_step(model: Pyramid) -> None:
    found = level_steps(model, [lambda: model(images())])
    inputs = levels(model, images())
    weight, bias = model.shared.compressed_weight(), model.shared.bias
    with own_steps(model, found):
        outputs = model(images())
        again = model(images())
    for step, x, y, same in zip(found, inputs, outputs, again, strict=True):
        values = quantized(x.detach().numpy(), step.step, step.signed)
        wanted = nn.functional.conv2d(torch.from_numpy(values).float(), weight, bias)
        assert torch.allclose(y, wanted, atol=1e-5)
        assert torch.equal(y, same)


def test_the_model_is_left_as_it_was(model: Pyramid) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = model(images())
    found = level_steps(model, [lambda: model(images())])
    with own_steps(model, found):
        assert not torch.equal(model(images())[2], outputs[2])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model(images()), outputs, strict=True))
    assert not model.shared._forward_pre_hooks


def test_a_layer_that_runs_once_has_no_levels(model: Pyramid) -> None:
    model.single.set_activation_range(images().flatten(), signed=True)
    assert {s.layer for s in level_steps(model, [lambda: model(images())])} == {'shared'}
