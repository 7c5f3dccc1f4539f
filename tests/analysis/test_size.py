"""The bound that packed files are compared with, against sums over a histogram."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

import slope_mm
from slope_mm.analysis.size import order0_bits


def entropy(symbols: list[int]) -> float:
    counts = Counter(symbols)
    return sum(n * math.log2(len(symbols) / n) for n in counts.values())


@pytest.mark.parametrize('sparsity', [None, '2:4', '2:8', 'unstructured:0.3'])
def test_the_bound_is_the_entropy_of_index_and_codes(sparsity: str | None) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 16))
    slope_mm.convert(layer, dict(weight=dict(sparsity=sparsity, bits=3)))
    layer = layer[0]
    mask = torch.ones_like(layer.weight, dtype=torch.bool) if layer.mask is None else layer.mask
    index = {
        None: 0.0,
        '2:4': 128 * math.log2(6),
        '2:8': 64 * math.log2(28),
        'unstructured:0.3': entropy(mask.flatten().tolist()),
    }[sparsity]
    assert order0_bits(layer) == pytest.approx(index + entropy(layer.codes()[mask].tolist()))


def test_values_at_full_precision_count_as_they_are() -> None:
    model = slope_mm.convert(nn.Sequential(nn.Linear(8, 4)), dict(weight=dict(sparsity='2:4')))
    assert order0_bits(model[0]) == pytest.approx(16 * 32 + 8 * math.log2(6))
