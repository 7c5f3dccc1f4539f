"""The passes through kernels that are compiled ahead of time for a CPU: a loop or two each way.

The result is that of the plain passes, bit for bit but for the order in which sums are added up.
W and its mask, or an activation before it was quantized, are kept for the backward pass: rounding
again is cheaper than keeping what it gave, finding a group's largest is not. A mask goes where the
compressed weight is let go, and is found once more with it. Rows in which equal magnitudes stand at
a group's limit are done over by the plain passes. The first use on a machine compiles for a minute;
later ones load what is on disk (:mod:`slope_mm.ops.kernel_store`). Measurements:
docs/performance.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slope_mm.ops import kernel_store, mask_bits, weight_pass
from slope_mm.ops.kernel_code import MASK
from slope_mm.ops.quantization import Codes, positive, scaled_gradient
from slope_mm.ops.selection import BLOCK
from slope_mm.ops.weight_pass import DENSE, Groups

# A rank is counted by comparing with all members of a group.
LARGEST_GROUP = 16
# Above this size the limit of a group that keeps few is better found once, where that fills a
# vector of eight: with members so far apart, or side by side. (Each N has kernels of its own there,
# and a ramp comes by all.)
RANKED_GROUP, LONG_KERNEL, FEW = 8, 8, 2
GRADIENTS = ('ste', 'sr_ste', 'masked')
# Weights up to this size are copied between two rows of padding, where they stay in the cache.
SMALL = BLOCK // 2
# Of a mask that is found in fp32: 2 MB of it.
PIECE = 2**19


def fits_weight(
    rows: Tensor, codes: Codes | None, mask: Tensor | None, groups: Groups | None, gradient: str
) -> bool:
    """Whether the kernels know this case (and can be had); the plain passes know all."""
    finds = mask is None and groups is not None
    return (
        _fits(rows)
        and codes is not None
        and (not finds or (groups or DENSE).m <= LARGEST_GROUP)
        and gradient in GRADIENTS
        and min(rows.shape) > 1
        and kernel_store.kernels(*_needed(mask, groups)) is not None
    )


def _needed(mask: Tensor | None, groups: Groups | None) -> list[kernel_store.Name]:
    """The kernels of a weight; layers find their masks, keep them and let go what they masked."""
    if mask is None and groups is not None:
        return [*_finding(groups), ('given_forward', 1), ('weight_backward', 1)]
    masked = int(mask is not None)
    return [('given_forward', masked), ('weight_backward', masked)]


@functools.lru_cache(256)
def _finding(groups: Groups) -> list[kernel_store.Name]:
    """The kernel of a forward pass that finds a mask, or those that find the mask alone."""
    n, m, kernel = groups
    if m > RANKED_GROUP and n <= FEW:
        if kernel >= LONG_KERNEL:
            return [('thresholds', n, m), ('threshold_mask',)]
        if kernel == 1 and m % 8 == 0:
            return [('row_mask', n, m)]
    return [('weight_forward', m)]


def fits_activation(x: Tensor) -> bool:
    """The same for a quantizer with a single step."""
    return (
        _fits(x)
        and min(_factors(x)) > 1
        and kernel_store.kernels(('activation_forward',), ('activation_backward',)) is not None
    )


def _factors(x: Tensor) -> tuple[int, int]:
    """Rows and their length that a tensor's values are taken as: one sum is made of each row.

    A feature map's rows are its channels, short enough for a sum in fp32.
    """
    rows = math.prod(x.shape[:-2]) if x.dim() > 2 else math.prod(x.shape[:-1])
    length = x.numel() // max(rows, 1)
    return rows, length


def _fits(x: Tensor) -> bool:
    is_plain = x.dtype == torch.float32 and x.device.type == 'cpu'
    return is_plain and x.numel() > 1 and kernel_store.available()


@functools.lru_cache(256)
def _member(length: int, groups: Groups) -> Tensor:
    """Each position's index in its group."""
    with torch.inference_mode(False):
        return (torch.arange(length) // groups.kernel % groups.m).to(torch.float32)


@functools.lru_cache(256)
def _scalars(
    codes: Codes, n: int = 0, gradient: str = 'ste', decay: float = 0.0, grad_scale: float = 1.0
) -> Tensor:
    """The vector of :data:`~slope_mm.ops.kernel_code.SCALARS`."""
    share = 0.0 if gradient == 'masked' else 1.0
    decay = decay if gradient == 'sr_ste' else 0.0
    with torch.inference_mode(False):
        return torch.tensor([codes.qn, codes.qp, codes.offset, n, share, decay, grad_scale])


@functools.lru_cache(256)
def _marker(kernel: int) -> Tensor:
    """The kernel size as a size (:mod:`slope_mm.ops.kernel_code`)."""
    with torch.inference_mode(False):
        return torch.zeros(kernel + 2)


def _by_row(step: Tensor, count: int) -> Tensor:
    """Learned steps as they are, one a row, ``[rows, 1]``: kernels make them positive."""
    return step.detach().float().reshape(-1, 1).expand(count, 1).contiguous()


def forward_pass(
    w: Tensor, step: Tensor, codes: Codes, mask: Tensor | None, groups: Groups | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums and the mask.

    The mask comes as :data:`~slope_mm.ops.kernel_code.MASK`, which is taken for a mask as well.
    """
    steps, scalars = _by_row(step, w.shape[0]), _scalars(codes, groups.n if groups else 0)
    if mask is not None or groups is None:
        mask = None if mask is None else mask.to(MASK)
        compressed, sums = _given(w, mask, steps, scalars)
        return compressed, sums[:3], mask
    finding = _finding(groups)
    kernels = [_one(*name) for name in finding]
    if finding[0][0] == 'weight_forward':
        compressed, found, sums = _all_at_once(w, steps, scalars, groups, *kernels)
    else:
        found = _large_groups(w, groups, kernels)
        compressed, sums = _given(w, found, steps, scalars)
    powers = sums[:3]
    _redo_ties(sums[3], w, steps, codes, groups, compressed, powers, found)
    return compressed, powers, found


def _given(w: Tensor, mask: Tensor | None, steps: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
    """Compressed rows under a mask or none, and their sums; under a mask what it keeps as well."""
    given = [] if mask is None else [mask]
    compressed, *sums = _one('given_forward', len(given))([w, *given, steps, scalars])
    return compressed, torch.stack(sums)


def _large_groups(w: Tensor, groups: Groups, kernels: Sequence[Callable[..., Any]]) -> Tensor:
    """The mask of a weight, by its groups' limits if their members lie apart, else by rows."""
    mask = torch.empty_like(w, dtype=MASK)
    height = max(1, PIECE // w.shape[1])
    for start in range(0, w.shape[0], height):
        rows = w[start : start + height]
        if groups.kernel == 1:
            found = kernels[0]([rows.view(-1, groups.m)])[0]
        else:
            members = rows.view(-1, groups.m, groups.kernel)
            found = kernels[1]([members, *kernels[0]([members])])[0]
        mask[start : start + height] = found.view_as(rows)
    return mask


def _all_at_once(
    w: Tensor, steps: Tensor, scalars: Tensor, groups: Groups, kernel: Callable[..., Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel makes of rows that have one on either side.

    What lies outside of a group is read and not looked at, so it may be anything that is there:
    rows in the middle lie between the first and the last, which are copied.
    """
    count, length = w.shape
    compressed, mask = torch.empty_like(w), torch.empty_like(w, dtype=MASK)
    given = [_marker(groups.kernel), _member(length, groups)]
    if w.numel() <= SMALL or count < 4:
        padded = w.new_empty(count + 2, length)
        padded[1:-1] = w
        by_row = kernel([padded, *given, steps, scalars, compressed, mask])
        return compressed, mask, torch.stack(by_row)
    inner = [x[1:-1] for x in (steps, compressed, mask)]
    middle = kernel([w, *given, inner[0], scalars, *inner[1:]])
    ends = slice(0, count, count - 1)
    edges = w.new_empty(4, length)
    edges[1:3] = w[ends]
    outer = [steps[ends].contiguous(), *(x.new_empty(2, length) for x in (compressed, mask))]
    ends_by_row = kernel([edges, *given, outer[0], scalars, *outer[1:]])
    compressed[ends], mask[ends] = outer[1:]
    sums = w.new_empty(len(middle), count)
    sums[:, 1:-1], sums[:, ends] = torch.stack(middle), torch.stack(ends_by_row)
    return compressed, mask, sums


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    step: Tensor,
    codes: Codes,
    mask: Tensor | None,
    groups: Groups | None,
    *,
    powers: Tensor,
    grad_scale: float,
    gradient: str,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.backward_pass`; finds the compressed weight again.

    The sums are the forward pass's, and so is the mask, which is found again where it is missing.
    The step's gradient is complete.
    """
    count = w.shape[0]
    if grad is None:
        # SR-STE's decay comes with the task's gradient.
        grad, decay = torch.zeros_like(w), 0.0
    grad_powers = torch.zeros_like(powers) if grad_powers is None else grad_powers.contiguous()
    if mask is None and groups is not None:
        mask = forward_pass(w, step, codes, None, groups)[2]
    given = [grad, w, *([] if mask is None else [mask.to(MASK)])]
    by_row = [_by_row(step, count), powers, grad_powers]
    kernel = _one('weight_backward', int(mask is not None))
    scalars = _scalars(codes, 0, gradient, decay, grad_scale)
    grad_w, grad_step = kernel([*given, *by_row, scalars])
    if step.numel() == 1 < count:
        grad_step = grad_step.sum()
    return grad_w, grad_step.reshape(step.shape).to(step.dtype)


def _redo_ties(
    counts: Tensor,
    w: Tensor,
    steps: Tensor,
    codes: Codes,
    groups: Groups,
    compressed: Tensor,
    powers: Tensor,
    mask: Tensor,
) -> None:
    """Does rows over of which a kernel kept other than N of each group, in place."""
    # What is not a number is not kept, or not compared with.
    others = counts != w.shape[1] // groups.m * groups.n
    if not others.any():
        return
    tied = others.nonzero().flatten()
    rows = w[tied]
    compressed[tied], powers[:, tied], kept = weight_pass.forward_pass(
        rows, positive(steps[tied]), codes, None, groups, sums=True, keep_mask=True
    )
    assert kept is not None
    mask[tied] = mask_bits.read(kept, torch.empty_like(rows, dtype=MASK))


def _one(*name: Any) -> Callable[..., Any]:
    found = kernel_store.kernels(name)
    assert found is not None
    return found[0]


def quantize_forward(x: Tensor, step: Tensor, codes: Codes, result: Tensor) -> None:
    """:func:`slope_mm.ops.activation_pass.quantize_forward` of a dense tensor into one like it."""
    flat = [t.as_strided((t.numel(),), (1,)) for t in (x, result)]
    s = positive(step).reshape(1)
    _one('activation_forward')([flat[0], s, _scalars(codes), flat[1]])


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, codes: Codes, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.activation_pass.quantize_backward`; ``grad`` lies in memory as ``x``."""
    result = torch.empty_like(x)
    rows, length = _factors(x)
    flat = [t.as_strided((rows, length), (length, 1)) for t in (grad, x, result)]
    by_row = x.new_empty(rows)
    steps = positive(step).reshape(1, 1).expand(rows, 1).contiguous()
    _one('activation_backward')([*flat[:2], steps, _scalars(codes), flat[2], by_row])
    return result, scaled_gradient(by_row.sum(dtype=torch.float64), step, grad_scale)
