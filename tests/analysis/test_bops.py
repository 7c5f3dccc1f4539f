"""Multiply-accumulates against loops and closed forms, and bit operations of compressed layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slope_mm import convert
from slope_mm.analysis.bops import count_operations


def macs_by_impulses(layer: nn.Module, x: torch.Tensor) -> int:
    """Counts products one by one: with all ones as weight, an impulse shows who uses an input."""
    with torch.no_grad():
        layer.weight.fill_(1.0)
        total = 0.0
        for index in range(x.numel()):
            impulse = torch.zeros_like(x)
            impulse.view(-1)[index] = 1.0
            total += float(layer(impulse).sum())
    return round(total)


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (nn.Conv2d(4, 6, 3, bias=False), (1, 4, 5, 6)),
        (nn.Conv2d(4, 6, 1, stride=2, bias=False), (1, 4, 6, 6)),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False), (1, 4, 3, 3)),
        (nn.Linear(8, 3, bias=False), (5, 8)),
    ],
    ids=['conv', 'strided', 'grouped', 'transposed', 'linear'],
)
def test_macs_are_the_products_that_are_made(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(layer), torch.zeros(shape)
    counted = count_operations(model, lambda: model(x))
    assert counted.macs == macs_by_impulses(layer, x)
    assert counted.bops == counted.macs * 32 * 32


def test_bops_weigh_macs_with_density_and_bits() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    rules = [{'match': '2', 'weight': {'sparsity': None, 'bits': None}, 'activation': None}]
    recipe = {'weight': {'sparsity': '2:8', 'bits': 2}, 'activation': {'bits': 4}, 'rules': rules}
    convert(model, recipe)
    x = torch.randn(1, 8, 6, 6)
    counted = count_operations(model, lambda: model(x))
    first, last = 4 * 4 * 8 * 8 * 9, 4 * 4 * 4 * 8
    assert counted.macs == first + last
    assert counted.bops == first * (2 / 8) * 2 * 4 + last * 32 * 32


def test_counting_leaves_no_hooks_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        count_operations(model, lambda: model(torch.zeros(2, 3)))
    assert not model[0]._forward_hooks
