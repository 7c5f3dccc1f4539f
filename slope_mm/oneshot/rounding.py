"""Error-compensating pruning and rounding of one matrix (SparseGPT, GPTQ).

For ``Y = W X^T`` and ``H = X^T X`` the error of the output is ``tr((W - Ŵ) H (W - Ŵ)^T)``. Columns
are compressed one after the other, and what each leaves is made up for, as far as possible, by the
columns that are still to come (optimal brain surgery; arXiv 2210.17323 for rounding, 2301.00774 for
pruning). With ``U`` upper triangular, ``U^T U = H^-1``:

    e_j = (w_j - ŵ_j) / U_jj,     w_k -= e_j U_jk   for k > j

At the first column of a group the pattern's mask is chosen, by the largest ``|w_k / U_kk|``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slope_mm.ops import Codes, NMPattern, mse_init_step, nm_mask
from slope_mm.ops.quantization import SMALLEST_STEP, from_codes, to_codes

# Share of the mean diagonal that is added to H, as in GPTQ: it bounds what a column corrects in
# others, and makes the moments of few samples invertible.
DAMPING = 0.01
# The same of a column that the input never used.
UNUSED = 1e-6
# Columns whose corrections of later ones are applied in one product.
_BLOCK = 128


@dataclass(frozen=True)
class Compensated:
    """One matrix, compressed.

    Attributes:
        corrected: What every column had become when its turn came; its codes are the result's.
        mask: True where kept.
        compressed: The result.
        step: Steps of the result, ``[rows, 1]``; None without quantization.
    """

    corrected: Tensor
    mask: Tensor
    compressed: Tensor
    step: Tensor | None


def inverse_factor(hessian: Tensor) -> Tensor:
    """``U``, upper triangular with ``U^T U = (H + DAMPING * mean(diag H) * I)^-1``, in float64.

    Args:
        hessian: ``[columns, columns]``, symmetric, positive semidefinite. Columns that the input
            never used are damped next to nothing: a pattern keeps any other weight first.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    unused = diagonal <= 0
    diagonal += DAMPING * mean
    diagonal[unused] = UNUSED * mean
    lower = torch.linalg.cholesky(h)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """``diag(D H D^T)``: squared error of each row's outputs, ``[rows]`` in float64."""
    d = difference.double()
    return ((d @ hessian.double()) * d).sum(1)


def compress_columns(
    w: Tensor,
    factor: Tensor,
    *,
    pattern: NMPattern | None = None,
    mask: Tensor | None = None,
    codes: Codes | None = None,
    step: Tensor | None = None,
) -> Compensated:
    """Prunes and rounds the columns of a matrix in order, correcting those to come.

    Args:
        w: ``[rows, columns]``.
        factor: ``U`` of :func:`inverse_factor`.
        pattern: N:M pattern to choose the mask by on the way; columns are a multiple of M.
        mask: A mask that is settled already, instead.
        codes: Code set; None prunes alone.
        step: Steps, ``[rows, 1]``.
    """
    w = w.double().clone()
    rows, columns = w.shape
    corrected, compressed = torch.empty_like(w), torch.empty_like(w)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    steps = None if step is None else step.double()
    diagonal = factor.diagonal()
    # Whole groups in a block.
    block = _BLOCK if pattern is None else pattern.m * math.ceil(_BLOCK / pattern.m)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = w.new_empty(rows, stop - start)
        for j in range(start, stop):
            if pattern is not None and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                kept[:, group] = nm_mask(w[:, group] / diagonal[group], pattern.n, pattern.m)
            column = w[:, j]
            result = column
            if codes is not None and steps is not None:
                result = from_codes(to_codes(column[:, None], steps, codes), steps, codes)[:, 0]
            result = result * kept[:, j]
            corrected[:, j], compressed[:, j] = column, result
            error = (column - result) / diagonal[j]
            errors[:, j - start] = error
            w[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return Compensated(corrected, kept, compressed, step)


def compensate(
    w: Tensor,
    hessians: list[Tensor],
    *,
    pattern: NMPattern | None = None,
    mask: Tensor | None = None,
    codes: Codes | None = None,
    per_row: bool = True,
) -> Compensated:
    """Compresses a matrix whose columns fall into independent runs.

    First the mask is chosen by pruning alone; the steps are those of least squared error on what
    pruning left; then the columns are rounded under that mask; last the steps become those of least
    output error for the codes as they are: ``<l, w>_H / <l, l>_H`` with the levels ``l``.

    Args:
        w: ``[rows, columns]``.
        hessians: Of consecutive runs of columns; together as many as ``w`` has. Runs do not correct
            each other.
        pattern: N:M pattern; runs are multiples of M.
        mask: A mask that is settled already, instead.
        codes: Code set; None without quantization.
        per_row: One step a row, or one for all.
    """
    lengths = [hessian.shape[0] for hessian in hessians]
    runs, factors = w.split(lengths, 1), [inverse_factor(h) for h in hessians]

    def each(masks: Sequence[Tensor | None], **how: Any) -> Compensated:
        parts = [
            compress_columns(run, factor, mask=given, **how)
            for run, factor, given in zip(runs, factors, masks, strict=True)
        ]
        return Compensated(
            torch.cat([part.corrected for part in parts], 1),
            torch.cat([part.mask for part in parts], 1),
            torch.cat([part.compressed for part in parts], 1),
            how.get('step'),
        )

    pruned = Compensated(w.double(), torch.ones_like(w, dtype=torch.bool), w.double(), None)
    if mask is not None:
        pruned = each(mask.split(lengths, 1))
    elif pattern is not None:
        pruned = each([None] * len(lengths), pattern=pattern)
    if codes is None:
        return pruned
    step = mse_init_step(pruned.compressed, codes, 0 if per_row else None, pruned.mask).double()
    step = step.expand(w.shape[0], 1)
    rounded = each(pruned.mask.split(lengths, 1), codes=codes, step=step)
    levels = (rounded.compressed / step).split(lengths, 1)
    # In units of the step nothing changes: codes stay.
    scale = _fitted_step(runs, hessians, levels, step, per_row) / step
    return Compensated(
        rounded.corrected * scale, rounded.mask, rounded.compressed * scale, step * scale
    )


def _fitted_step(
    runs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    levels: Sequence[Tensor],
    step: Tensor,
    per_row: bool,
) -> Tensor:
    """The steps of least output error for fixed codes; as they were where that has none."""
    power, product = torch.zeros_like(step), torch.zeros_like(step)
    for run, hessian, level in zip(runs, hessians, levels, strict=True):
        seen = level @ hessian.double()
        power += (seen * level).sum(1, keepdim=True)
        product += (seen * run.double()).sum(1, keepdim=True)
    if not per_row:
        power, product = power.sum().expand_as(step), product.sum().expand_as(step)
    best = product / power.clamp_min(1e-300)
    return torch.where((power > 0) & (best > SMALLEST_STEP), best, step)
