"""Weight errors of sparsity and quantization, against a computation of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slope_mm.analysis.interplay import layer_errors


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 8))


def test_errors_of_single_steps_are_what_their_definition_says(model: nn.Module) -> None:
    found = {item.name: item for item in layer_errors(model, '2:4', 8)}
    # The stem stays dense.
    assert set(found) == {'1', '2'}
    weight = model[2].weight.detach()
    groups = weight.reshape(8, 4, 4)
    kept = groups.abs().argsort(dim=2, descending=True)[:, :, :2]
    sparse = torch.zeros_like(groups).scatter(2, kept, groups.gather(2, kept)).reshape(8, 16)
    expected = float((weight - sparse).norm() / weight.norm())
    assert found['2'].sparse == pytest.approx(expected, rel=1e-5)
    # Uniform rounding to 256 levels over about twice the largest weight.
    assert 0 < found['2'].quantized < 0.01


def test_sparsity_first_loses_no_more_than_the_sum(model: nn.Module) -> None:
    for bits in (2, 4):
        for item in layer_errors(model, '2:4', bits):
            assert item.s_then_q <= item.sparse + item.quantized
            assert item.excess == pytest.approx(item.s_then_q / (item.sparse + item.quantized))
            assert item.q_then_s > item.s_then_q * 0.9


def test_the_model_stays_as_it_is(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_errors(model, '2:4', 4)
    assert type(model[1]) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
