"""Compensated pruning and rounding against loops over explicit inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from slope_mm.oneshot.rounding import (
    compensate,
    compress_columns,
    inverse_factor,
    output_error,
)
from slope_mm.ops import NMPattern, compress_weight, mse_init_step, nm_mask, weight_codes

PATTERN = NMPattern(2, 4)


def problem(rows: int = 5, columns: int = 16, samples: int = 60) -> tuple[Tensor, Tensor]:
    """A matrix and the second moments of correlated inputs."""
    draw = torch.Generator().manual_seed(rows * columns)
    mixed = torch.randn(columns, columns, generator=draw)
    inputs = torch.randn(samples, columns, generator=draw) @ (mixed + 2)
    w = torch.randn(rows, columns, generator=draw)
    return w, inputs.T @ inputs


def by_loops(
    w: Tensor, hessian: Tensor, step: NDArray, low: int, high: int, prune: bool
) -> tuple[NDArray, NDArray]:
    """Optimal brain surgery as its derivation has it: the inverse of what is left, every time."""
    w = w.double().numpy().copy()
    h = hessian.double().numpy().copy()
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    result, kept = np.zeros_like(w), np.ones_like(w, dtype=bool)
    # What SparseGPT ranks by: each column's entry when all columns before it are gone.
    entry = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))]
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if prune and j % 4 == 0:
                scores = [w[row, k] ** 2 / entry[k] for k in range(j, j + 4)]
                for position in np.argsort(scores)[:2]:
                    kept[row, j + position] = False
            value = np.clip(np.rint(w[row, j] / step[row]), low, high) * step[row]
            result[row, j] = value if kept[row, j] else 0
            inverse = np.linalg.inv(h[j:, j:])
            w[row, j:] -= (w[row, j] - result[row, j]) / inverse[0, 0] * inverse[0]
    return result, kept


@pytest.mark.parametrize('prune', [False, True])
def test_columns_follow_the_derivation(prune: bool) -> None:
    w, hessian = problem()
    codes = weight_codes('lsq', 3)
    step = mse_init_step(w, codes, 0)
    found = compress_columns(
        w,
        inverse_factor(hessian),
        pattern=PATTERN if prune else None,
        codes=codes,
        step=step,
    )
    result, kept = by_loops(w, hessian, step[:, 0].double().numpy(), -4, 3, prune)
    assert np.array_equal(found.mask.numpy(), kept)
    assert np.allclose(found.compressed.numpy(), result, atol=1e-9)


def test_blocks_of_columns_are_one_procedure() -> None:
    # More columns than are corrected at once, against the same loops.
    w, hessian = problem(2, 140, 400)
    codes = weight_codes('symmetric', 4)
    step = mse_init_step(w, codes, 0)
    found = compress_columns(w, inverse_factor(hessian), codes=codes, step=step)
    result, _ = by_loops(w, hessian, step[:, 0].double().numpy(), -7, 7, False)
    assert np.allclose(found.compressed.numpy(), result, atol=1e-8)


@pytest.mark.parametrize('name', ['lsq', 'symmetric', 'odd'])
@pytest.mark.parametrize('pattern', [None, PATTERN, NMPattern(2, 8)])
@pytest.mark.parametrize('per_row', [True, False])
def test_outputs_are_closer_than_by_plain_rounding(
    name: str, pattern: NMPattern | None, per_row: bool
) -> None:
    w, hessian = problem(12, 64, 300)
    codes = weight_codes(name, 3)
    mask = None if pattern is None else nm_mask(w, pattern.n, pattern.m)
    plain = compress_weight(w, mse_init_step(w, codes, 0, mask), mask, codes)
    found = compensate(w, [hessian], pattern=pattern, codes=codes, per_row=per_row)
    before, after = output_error(w - plain, hessian), output_error(w - found.compressed, hessian)
    assert after.sum() < 0.5 * before.sum()
    assert found.step is not None
    level = found.compressed / found.step - codes.offset * found.mask
    assert torch.allclose(level, level.round(), atol=1e-9)
    assert codes.qn <= level.round().min() and level.round().max() <= codes.qp
    if not per_row:
        assert len(found.step.unique()) == 1
    if pattern is not None:
        assert torch.all(found.mask.view(12, -1, pattern.m).sum(-1) == pattern.n)


def test_no_other_step_is_better_for_the_codes_found() -> None:
    w, hessian = problem(6, 32, 200)
    found = compensate(w, [hessian], pattern=PATTERN, codes=weight_codes('lsq', 4))
    best = output_error(w - found.compressed, hessian)
    for factor in (0.97, 0.99, 1.01, 1.03):
        assert torch.all(output_error(w - found.compressed * factor, hessian) > best)


def test_pruning_alone_and_a_settled_mask() -> None:
    w, hessian = problem(6, 32, 200)
    mask = nm_mask(w, 2, 4)
    found = compensate(w, [hessian], mask=mask)
    assert torch.equal(found.mask, mask) and found.step is None
    assert torch.all(found.compressed[~mask] == 0)
    assert (
        output_error(w - found.compressed, hessian).sum()
        < output_error(w - w * mask, hessian).sum()
    )


def test_runs_of_columns_do_not_touch_each_other() -> None:
    w, hessian = problem(6, 32, 200)
    halves = [hessian[:16, :16], hessian[16:, 16:]]
    codes = weight_codes('lsq', 4)
    found = compensate(w, halves, codes=codes)
    changed = w.clone()
    changed[:, 16:] = 0.01
    # The steps are shared by a row; with them fixed, each half is its own problem.
    step = mse_init_step(w, codes, 0)
    parts = [
        compress_columns(changed[:, part], inverse_factor(h), codes=codes, step=step)
        for part, h in zip((slice(16), slice(16, 32)), halves, strict=True)
    ]
    assert found.step is not None
    assert torch.allclose(found.compressed[:, :16] / found.step, parts[0].compressed / step)


def test_inputs_that_are_never_used_do_no_harm() -> None:
    w, hessian = problem(4, 16, 100)
    hessian[3], hessian[:, 3] = 0, 0
    found = compensate(w, [hessian], codes=weight_codes('lsq', 8))
    assert torch.isfinite(found.compressed).all()
    assert torch.allclose(found.corrected[:, 3] / w[:, 3], torch.ones(4).double(), rtol=0.05)
    # Whatever the inputs' scale, a pattern spends nothing on what is never used.
    for scale in (1.0, 1e-4):
        kept = compensate(w, [scale * hessian], pattern=NMPattern(2, 4)).mask
        assert not kept[:, 3].any()
        assert torch.equal(kept.view(4, 4, 4).sum(2), torch.full((4, 4), 2))
    zeros = compensate(w, [torch.zeros(16, 16)], codes=weight_codes('lsq', 8))
    assert torch.isfinite(zeros.compressed).all()
