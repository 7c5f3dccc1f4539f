"""Metrics of compressed weights: against the formulas they are named for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_cases import random_tensor

from slope_mm.ops import (
    clipped_share,
    compress_weight,
    cosine,
    flip_rate,
    mse_init_step,
    nm_mask,
    sqnr_db,
    weight_codes,
    zero_share,
)


@pytest.fixture
def compressed_pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, compressed weight, step and mask at 2:4 and 3 bits."""
    w, codes = random_tensor((8, 16, 3, 3)), weight_codes('lsq', 3)
    mask = nm_mask(w, 2, 4)
    step = mse_init_step(w, codes, 0, mask)
    return w, compress_weight(w, step, mask, codes), step, mask


def test_cosine_and_sqnr_are_the_formulas(
    compressed_pair: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    a, b = (x.double().flatten() for x in compressed_pair[:2])
    assert float(cosine(a, b)) == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-5)
    expected = 10 * math.log10(float(a @ a) / float((a - b) @ (a - b)))
    assert float(sqnr_db(a, b)) == pytest.approx(expected, rel=1e-5)


def test_large_tensors_lose_nothing_to_rounding() -> None:
    a = random_tensor((4_000_000,))
    b = a + 0.1 * random_tensor((4_000_000,), seed=1)
    x, y = a.double().numpy(), b.double().numpy()
    assert float(cosine(a, a)) == 1
    assert float(cosine(a, b)) == pytest.approx(
        (x @ y) / np.sqrt((x @ x) * (y @ y)), rel=0, abs=1e-7
    )
    noise = x - y
    decibels = 10 * np.log10((x @ x) / (noise @ noise))
    assert float(sqnr_db(a, b)) == pytest.approx(decibels, abs=1e-5)


def test_metrics_of_zero_and_of_equal_tensors() -> None:
    w, zero = random_tensor((4, 8)), torch.zeros(4, 8)
    assert float(cosine(zero, zero)) == 1
    assert float(cosine(w, zero)) == 0
    assert float(cosine(w, w)) == pytest.approx(1)
    assert float(sqnr_db(w, w)) == math.inf
    assert float(sqnr_db(zero, zero)) == math.inf
    assert float(sqnr_db(w, zero)) == pytest.approx(0, abs=1e-5)


def test_flip_rate_counts_changed_entries() -> None:
    before = nm_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2, 4)
    after = nm_mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 2, 4)
    assert float(flip_rate(before, after)) == 0.5
    assert float(flip_rate(before, before)) == 0


@pytest.mark.parametrize('masked', [True, False])
def test_shares_are_counted_over_kept_weights(
    compressed_pair: tuple[Tensor, Tensor, Tensor, Tensor], masked: bool
) -> None:
    w, compressed, step, mask = compressed_pair
    kept, clipped, zeros = 0, 0, 0
    for index in np.ndindex(*w.shape):
        if masked and not mask[index]:
            continue
        kept += 1
        v = w[index].item() / step[index[0], 0, 0, 0].item()
        clipped += not -4 < v < 3
        zeros += compressed[index].item() == 0
    given_mask = mask if masked else None
    share = float(clipped_share(w, step, weight_codes('lsq', 3), given_mask))
    assert share == pytest.approx(clipped / kept) and 0 < share < 1
    assert float(zero_share(compressed, given_mask)) == pytest.approx(zeros / kept)


@pytest.mark.parametrize('metric', [cosine, sqnr_db])
def test_metrics_have_no_graph(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    w = random_tensor((4, 8)).requires_grad_()
    value = metric(w, w * 0.9)
    assert not value.requires_grad and value.dtype == torch.float32 and value.shape == ()
