"""Second moments: what is counted, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope_mm
from slope_mm.oneshot.moments import SecondMoments, moment_bytes, run_lengths, stages


@pytest.mark.parametrize(
    ('columns', 'unit', 'limit', 'wanted'),
    [
        (100, 1, 200, [100]),
        (100, 4, 40, [32, 32, 36]),
        (12544, 16, 4608, [4176, 4176, 4192]),
        (64, 16, 10, [16, 16, 16, 16]),
    ],
)
def test_runs_hold_whole_groups(columns: int, unit: int, limit: int, wanted: list[int]) -> None:
    lengths = run_lengths(columns, unit, limit)
    assert lengths == wanted
    assert sum(lengths) == columns and all(length % unit == 0 for length in lengths)


def test_moments_add_up_over_calls() -> None:
    layer = slope_mm.convert(nn.Sequential(nn.Linear(8, 4)), dict(weight=dict(bits=4)))[0]
    moments, inputs = SecondMoments(layer), [torch.randn(3, 5, 8), torch.randn(2, 8)]
    assert not moments.seen
    for x in [*inputs, torch.empty(0, 8)]:
        moments.add(x)
    rows = torch.cat([x.reshape(-1, 8) for x in inputs])
    assert torch.allclose(moments.moments[0][0], rows.T @ rows, atol=1e-5)
    assert moments.seen


def test_stages_fit_in_memory_and_keep_the_order() -> None:
    model = nn.Sequential(*[nn.Linear(size, 8) for size in (16, 64, 16, 32, 8)])
    slope_mm.convert(model, dict(weight=dict(bits=4)))
    layers = slope_mm.compressed_layers(model)
    for name, layer in layers.items():
        tensors = [m for group in SecondMoments(layer).moments for m in group]
        assert moment_bytes(layer) == sum(t.numel() * t.element_size() for t in tensors), name
    limit = moment_bytes(layers['3']) + moment_bytes(layers['0'])
    found = stages(layers, limit)
    # Layer 1 alone takes more than the limit.
    assert found == [['0'], ['1'], ['2', '3'], ['4']]
