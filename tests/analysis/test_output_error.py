"""Output errors of layers that give tuples, zeros, or nothing at all."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.bops import count_operations, macs_by_layer
from slope_mm.analysis.output_error import OutputError, output_errors


class Calls(nn.Module):
    """A layer that runs twice, one that gives zeros, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8, bias=False)
        self.dead = nn.Linear(8, 8, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dead(self.twice(self.twice(x)) * 0)


@torch.no_grad()
def test_errors_add_up_over_calls_and_modes_stay() -> None:
    dense, x = Calls(), torch.randn(5, 8)
    twin = slope_mm.convert(copy.deepcopy(dense), dict(weight=dict(sparsity='2:4', bits=2)))
    twin.train()
    found = output_errors(dense, twin, lambda: dense(x))
    compressed = slope_mm.bake(twin).twice.weight
    noise = power = 0.0
    for inputs in (x, dense.twice(x)):
        wanted = inputs @ dense.twice.weight.T
        noise += float((inputs @ compressed.T - wanted).square().sum())
        power += float(wanted.square().sum())
    assert found['twice'].noise == pytest.approx(noise, rel=1e-4)
    assert found['twice'].power == pytest.approx(power, rel=1e-4)
    assert found['dead'].relative == 0
    assert 'unused' not in found
    assert all(module.training for module in twin.modules())


def test_noise_without_power_is_infinitely_much() -> None:
    assert OutputError(1.0, 0.0).relative == math.inf


def test_multiply_accumulates_of_layers_are_those_of_the_model() -> None:
    model, x = Calls(), torch.randn(5, 8)
    macs = macs_by_layer(model, lambda: model(x))
    assert macs == {'twice': 2 * 5 * 64, 'dead': 5 * 64}
    assert sum(macs.values()) == count_operations(model, lambda: model(x)).macs
