"""W to its compressed form and back, in one pass each.

A weight is read as rows: one output channel a row, its input channels and kernel positions along
it. On a CPU a pass takes a block of rows at a time that stays in the core's cache, so main memory
sees W once on the way in and the result once on the way out, and no temporary is larger than a
block. On other devices the block is the whole weight.

Forward, per row: ``ŵ`` and the sums ``w·w``, ``w·ŵ``, ``ŵ·ŵ``, from which cosine, SQNR and the
regularizers follow without another look at W. Backward, per row: the gradient of W and the step's,
those of the sums included. The mask is kept for it, a bit a weight
(:mod:`slope_mm.ops.mask_bits`): finding it again takes longer than reading it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slope_mm.ops import mask_bits
from slope_mm.ops.quantization import Codes, scaled_gradient
from slope_mm.ops.selection import Scratch, blocks, keep, kth_largest

# Width of the soft mask's sigmoid relative to its group's threshold. At 1/4 a weight on the
# threshold gets 1.5 times the task's gradient, one at zero 2 % of it, one at twice the threshold
# 1.1 times.
SOFT_TEMPERATURE = 0.25


class Groups(NamedTuple):
    """N:M groups along a row: ``n`` kept of ``m`` input channels, ``kernel`` positions apart."""

    n: int
    m: int
    kernel: int


# What fused kernels take for no groups: every weight is its group's largest.
DENSE = Groups(1, 1, 1)


def as_rows(x: Tensor, output_axis: int, input_axis: int) -> Tensor:
    """A contiguous ``[outputs, inputs * kernel]`` view or copy of a weight-shaped tensor."""
    if x.dim() > 1 and (output_axis, input_axis) != (0, 1):
        x = x.movedim((output_axis, input_axis), (0, 1))
    return x.reshape(x.shape[0], -1).contiguous()


def from_rows(rows: Tensor, shape: tuple[int, ...], output_axis: int, input_axis: int) -> Tensor:
    """The inverse of :func:`as_rows`, contiguous."""
    if len(shape) < 2 or (output_axis, input_axis) == (0, 1):
        return rows.view(shape)
    # Not `i not in (…)`: torch.compile, for which axes may be symbols, finds none of them there.
    rest = [size for i, size in enumerate(shape) if i != output_axis and i != input_axis]
    moved = rows.view(shape[output_axis], shape[input_axis], *rest)
    return moved.movedim((0, 1), (output_axis, input_axis)).contiguous()


def _kept(
    block: slice, rows: Tensor, mask: Tensor | None, groups: Groups | None, scratch: Scratch
) -> Tensor | None:
    """1 where kept, 0 where pruned; None for dense."""
    if mask is not None:
        return mask_bits.read(mask[block], scratch('kept', rows))
    if groups is None:
        return None
    return keep(rows, groups.n, groups.m, groups.kernel, scratch)


def _row_products(a: Tensor, b: Tensor, scratch: Scratch) -> Tensor:
    # torch adds up in pairs, where a norm or a matrix product adds one after the other: at 8 bits
    # 1 - cos is 1e-5, and the last digits of the sums are what is left of it.
    return torch.mul(a, b, out=scratch('marked', a)).sum(1)


def forward_pass(
    w: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    groups: Groups | None,
    *,
    sums: bool,
    keep_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Masks and quantizes rows.

    Args:
        w: ``[rows, length]``, floating.
        step: Positive steps ``[rows, 1]`` or ``[1, 1]``, fp32; None without quantization.
        codes: The code set; None without quantization.
        mask: Bool like ``w``, True where kept; None where ``groups`` decide, or for dense.
        groups: N:M groups to keep the largest of.
        sums: Whether all three sums are wanted; otherwise ``w·w`` alone is right.
        keep_mask: Whether the mask that ``groups`` gave is wanted.

    Returns:
        ``(compressed, sums, mask)``: like ``w``; ``[3, rows]`` in fp32 or better: ``w·w``, ``w·ŵ``,
        ``ŵ·ŵ``; and ``mask`` as it was given, or what was found (:mod:`slope_mm.ops.mask_bits`).
    """
    precision = torch.promote_types(w.dtype, torch.float32)
    compressed = torch.empty_like(w)
    powers = torch.zeros(3, w.shape[0], dtype=precision, device=w.device)
    scratch = Scratch(w, precision)
    found = mask_bits.room_for(w) if keep_mask and groups is not None else None
    for block in blocks(w):
        rows, target = w[block].to(precision), compressed[block]
        kept = _kept(block, rows, mask, groups, scratch)
        if found is not None and kept is not None:
            mask_bits.write(kept, found[block])
        level = rows
        if codes is not None and step is not None:
            s = step if step.shape[0] == 1 else step[block]
            level = torch.div(rows, s, out=scratch('members', rows))
            if codes.offset:
                level.sub_(codes.offset)
            level.round_().clamp_(codes.qn, codes.qp)
            if codes.offset:
                level.add_(codes.offset)
            level.mul_(s)
        if kept is None:
            target.copy_(level)
        elif target.dtype == precision:
            torch.mul(level, kept, out=target)
        else:
            target.copy_(torch.mul(level, kept, out=scratch('members', rows)))
        powers[0, block] = _row_products(rows, rows, scratch)
        if sums:
            # What a low-precision weight was rounded to is what counts.
            level = target.to(precision)
            powers[1, block] = _row_products(rows, level, scratch)
            powers[2, block] = _row_products(level, level, scratch)
    return compressed, powers, mask if found is None else found


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    compressed: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    *,
    groups: Groups | None = None,
    gradient: str,
    decay: float,
    wants_weight: bool,
    wants_step: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows: straight through for the task, exact for the sums.

    The task's gradient passes where a weight is pruned or inside the clip range. With the passed
    gradient g' LSQ's step gradient is ``(g·ŵ - g'·w) / s`` over the kept weights, per row.

    Args:
        grad: Gradient of the compressed rows.
        grad_powers: Gradient of the sums, ``[3, rows]``.
        w: As in the forward pass.
        compressed: Its result.
        step: As in the forward pass.
        codes: As in the forward pass.
        mask: Bool like ``w``, True where kept, or what the forward pass found; None for dense.
        groups: The N:M groups that the mask was found by; None where it was given.
        gradient: Name in :data:`~slope_mm.ops.GRADIENTS`.
        decay: SR-STE's.
        wants_weight: Whether the gradient of W is wanted.
        wants_step: Whether the step's is.

    Returns:
        ``(grad_w, grad_step)``: like ``w``; and ``[rows, 1]`` in fp32 or better, one value a row
        also where the rows share a step.
    """
    precision = torch.promote_types(w.dtype, torch.float32)
    quantized = codes is not None and step is not None
    grad_w = torch.empty_like(w) if wants_weight else None
    grad_step = None
    if quantized and wants_step:
        grad_step = torch.zeros(w.shape[0], 1, dtype=precision, device=w.device)
    scratch = Scratch(w, precision)
    for block in blocks(w):
        rows, level = w[block].to(precision), compressed[block].to(precision)
        total = None
        if grad is not None:
            total = grad[block].to(precision)
            kept = _kept(block, rows, mask, None, scratch)
            if codes is not None and step is not None:
                s = step if step.shape[0] == 1 else step[block]
                scaled = torch.div(rows, s, out=scratch('members', rows))
                if kept is not None:
                    # The clip range belongs to q, which a pruned weight enters as zero: inside.
                    scaled.mul_(kept)
                passed = _pass_inside(total, scaled, codes, out=scratch('passed', rows))
                if grad_step is not None:
                    whole = _row_products(total, level, scratch).unsqueeze(1).div_(s)
                    inside = _row_products(passed, scaled, scratch).unsqueeze(1)
                    grad_step[block] = whole.sub_(inside)
                total = passed
            if kept is not None and gradient == 'soft' and groups is not None:
                total = total * soft_factor(rows, groups)
            elif kept is not None and gradient in ('masked', 'soft'):
                # A mask that was given is a constant, and so is what it prunes.
                total = torch.mul(total, kept, out=scratch('passed', rows))
            if kept is not None and gradient == 'sr_ste':
                pruned = torch.sub(1, kept, out=kept).mul_(rows)
                total = torch.add(total, pruned, alpha=decay, out=scratch('passed', rows))
        if grad_w is None:
            continue
        if grad_powers is not None:
            by_row = grad_powers[:, block].unsqueeze(2).to(precision)
            target = grad_w[block] if w.dtype == precision else scratch('marked', rows)
            if total is None:
                total = torch.mul(level, by_row[1], out=target)
            else:
                total = torch.addcmul(total, level, by_row[1], out=target)
            total.addcmul_(rows, by_row[0], value=2)
        if total is None:
            grad_w[block] = 0
        elif total.data_ptr() != grad_w[block].data_ptr():
            grad_w[block] = total
    return grad_w, grad_step


def step_gradient(
    by_row: Tensor,
    step: Tensor,
    s: Tensor,
    grad_powers: Tensor | None,
    powers: Tensor,
    scale: float,
) -> Tensor:
    """The learned step's gradient from what :func:`backward_pass` says of each row.

    Args:
        by_row: ``[rows, 1]``, the task's part.
        step: Learned steps as they are: one, or one a row.
        s: The same as they are computed with, ``[rows, 1]`` or ``[1, 1]``.
        grad_powers: Gradient of the sums, ``[3, rows]``; None for zero.
        powers: The sums.
        scale: LSQ's.

    Returns:
        Tensor of ``step``'s shape and dtype.
    """
    if grad_powers is not None:
        # (code + offset) * step with the codes held fixed: the derivative of a product by the step
        # is the product by the step.
        exact = grad_powers[1] * powers[1] + 2 * grad_powers[2] * powers[2]
        by_row = by_row + exact.unsqueeze(1) / s
    if step.numel() == 1:
        by_row = by_row.sum()
    return scaled_gradient(by_row, step, scale)


def soft_factor(rows: Tensor, groups: Groups) -> Tensor:
    """The derivative of ``w * sigmoid((|w| - t) / T)`` by ``w``, the soft form of the mask.

    t lies halfway between the smallest kept and the largest pruned magnitude of a weight's group,
    ``T = SOFT_TEMPERATURE * t``; both count as constants. The sigmoid in place of the mask is that
    of learned threshold pruning (arXiv 2003.00075), on magnitudes instead of squares.

    Args:
        rows: ``[rows, length]``, fp32 or better.
        groups: N:M groups along a row.

    Returns:
        Tensor like ``rows``: ``m + |w| * m * (1 - m) / T`` with the soft mask m; 1 in groups whose
        threshold is zero.
    """
    n, m, kernel = groups
    members = rows.reshape(-1, m, kernel).transpose(0, 1).abs()
    threshold = (kth_largest(members, n) + kth_largest(members, n + 1)) / 2
    width = SOFT_TEMPERATURE * threshold
    soft = ((members - threshold) / width).sigmoid()
    factor = soft + members * soft * (1 - soft) / width
    factor = torch.where(threshold > 0, factor, torch.ones_like(factor))
    return factor.transpose(0, 1).reshape(rows.shape)


def _pass_inside(grad: Tensor, scaled: Tensor, codes: Codes, out: Tensor) -> Tensor:
    """``grad`` where ``qn < scaled - offset < qp``, zero elsewhere: one vector loop."""
    low, high = codes.qn + codes.offset, codes.qp + codes.offset
    return torch.ops.aten.hardtanh_backward.grad_input(grad, scaled, low, high, grad_input=out)
