"""The passes through kernels that are compiled ahead of time for a CPU: one loop each way.

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
from collections.abc import Callable
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
GRADIENTS = ('ste', 'sr_ste', 'masked')
# Weights up to this size are copied between two rows of padding, where they stay in the cache.
SMALL = BLOCK // 2


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


def _needed(mask: Tensor | None, groups: Groups | None) -> list[tuple[str, int]]:
    """The kernels of a weight; layers find their masks, keep them and let go what they masked."""
    if mask is None and groups is not None:
        return [('weight_forward', groups.m), ('given_forward', 1), ('weight_backward', 1)]
    masked = int(mask is not None)
    return [('given_forward', masked), ('weight_backward', masked)]


def fits_activation(x: Tensor) -> bool:
    """The same for a quantizer with a single step."""
    return (
        _fits(x)
        and min(_factors(x)) > 1
        and kernel_store.kernels(('activation_forward', 1), ('activation_backward', 1)) is not None
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


def _pieces(w: Tensor, groups: Groups) -> list[tuple[Tensor, slice | None]]:
    """All rows with one on either side, and which rows of the weight they are; None for all.

    What lies outside of a group is read and not looked at, so it may be anything that is there:
    rows in the middle lie between the first and the last, which are copied.
    """
    count, length = w.shape
    if w.numel() <= SMALL or count < 4:
        padded = w.new_empty(count + 2, length)
        padded[1:-1] = w
        return [(padded, None)]
    edges = w.new_empty(4, length)
    edges[1:3] = w[:: count - 1]
    return [(w, slice(1, -1)), (edges, slice(0, count, count - 1))]


def _by_row(step: Tensor, count: int) -> Tensor:
    """Learned steps as they are, one a row, ``[rows, 1]``: kernels make them positive."""
    return step.detach().float().reshape(-1, 1).expand(count, 1).contiguous()


def forward_pass(
    w: Tensor, step: Tensor, codes: Codes, mask: Tensor | None, groups: Groups | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums and the mask.

    The mask comes as :data:`~slope_mm.ops.kernel_code.MASK`, which is taken for a mask as well.
    """
    steps = _by_row(step, w.shape[0])
    if mask is None and groups is not None:
        return _find_mask(w, steps, codes, groups)
    mask = None if mask is None else mask.to(MASK)
    kernel = _one('given_forward', int(mask is not None))
    compressed, *powers = kernel([w, *([] if mask is None else [mask]), steps, _scalars(codes)])
    return compressed, torch.stack(powers), mask


def _find_mask(
    w: Tensor, steps: Tensor, codes: Codes, groups: Groups
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, scalars = _one('weight_forward', groups.m), _scalars(codes, groups.n)
    marker, member = _marker(groups.kernel), _member(w.shape[1], groups)
    compressed, mask = torch.empty_like(w), torch.empty_like(w, dtype=MASK)
    sums = w.new_empty(4, w.shape[0])
    for rows, where in _pieces(w, groups):
        if where is None:
            found = kernel([rows, marker, member, steps, scalars, compressed, mask])
            torch.stack(found, out=sums)
            continue
        targets = compressed[where], mask[where]
        # A kernel takes nothing but contiguous tensors.
        given = [t if t.is_contiguous() else torch.empty_like(t) for t in targets]
        found = kernel([rows, marker, member, steps[where].contiguous(), scalars, *given])
        sums[:, where] = torch.stack(found)
        for target, its in zip(targets, given, strict=True):
            if its is not target:
                target.copy_(its)
    powers = sums[:3]
    tied = _tied(sums[3], w, groups)
    if tied is not None:
        rows = w[tied]
        compressed[tied], powers[:, tied], kept = weight_pass.forward_pass(
            rows, positive(steps[tied]), codes, None, groups, sums=True, keep_mask=True
        )
        assert kept is not None
        mask[tied] = mask_bits.read(kept, torch.empty_like(rows, dtype=MASK))
    return compressed, powers, mask


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
        grad = torch.zeros_like(w)
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


def _tied(kept_count: Tensor, w: Tensor, groups: Groups) -> Tensor | None:
    """Rows of which a kernel kept more than N of each group; None where there is none."""
    expected = w.shape[1] // groups.m * groups.n
    # No kernel keeps fewer, and what is not a number makes it keep more.
    if float(kept_count.sum(dtype=torch.float64)) == expected * len(kept_count):
        return None
    return (kept_count != expected).nonzero().flatten()


def _one(name: str, m: int) -> Callable[..., Any]:
    found = kernel_store.kernels((name, m))
    assert found is not None
    return found[0]


def quantize_forward(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """:func:`slope_mm.ops.activation_pass.quantize_forward` of a dense tensor."""
    result = torch.empty_like(x)
    flat = [t.as_strided((t.numel(),), (1,)) for t in (x, result)]
    s = positive(step).reshape(1)
    _one('activation_forward', 1)([flat[0], s, _scalars(codes, 1), flat[1]])
    return result


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, codes: Codes, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.activation_pass.quantize_backward`; ``grad`` lies in memory as ``x``."""
    result = torch.empty_like(x)
    rows, length = _factors(x)
    flat = [t.as_strided((rows, length), (length, 1)) for t in (grad, x, result)]
    by_row = x.new_empty(rows)
    steps = positive(step).reshape(1, 1).expand(rows, 1).contiguous()
    _one('activation_backward', 1)([*flat[:2], steps, _scalars(codes, 1), flat[2], by_row])
    return result, scaled_gradient(by_row.sum(dtype=torch.float64), step, grad_scale)
