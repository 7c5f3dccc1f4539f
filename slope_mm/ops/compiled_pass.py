"""The passes through kernels that are compiled ahead of time for a CPU: one loop each way.

The result is that of the plain passes, bit for bit but for the order in which sums are added up.
Nothing but W, or the values before quantization, is kept for the backward pass: a group's largest
are found again. Rows in which equal magnitudes stand at a group's limit are done over by the plain
passes. The first use on a machine compiles for a minute; later ones load what is on disk
(:mod:`slope_mm.ops.kernel_store`). Measurements: docs/performance.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slope_mm.ops import kernel_store, weight_pass
from slope_mm.ops.quantization import Codes, positive, scaled_gradient
from slope_mm.ops.selection import BLOCK
from slope_mm.ops.weight_pass import DENSE, Groups, step_gradient

# A rank is counted by comparing with all members of a group.
LARGEST_GROUP = 16
GRADIENTS = ('ste', 'sr_ste', 'masked')
# Weights up to this size are copied between two rows of padding, where they stay in the cache.
SMALL = BLOCK // 2


def fits_weight(
    rows: Tensor, codes: Codes | None, mask: Tensor | None, groups: Groups | None, gradient: str
) -> bool:
    """Whether the kernels know this case (and can be had); the plain passes know all."""
    m = (groups or DENSE).m
    return (
        _fits(rows)
        and codes is not None
        and mask is None
        and m <= LARGEST_GROUP
        and gradient in GRADIENTS
        and min(rows.shape) > 1
        and kernel_store.kernels(('weight_forward', m), ('weight_backward', m)) is not None
    )


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
def _scalars(codes: Codes, n: int, gradient: str = 'ste', decay: float = 0.0) -> Tensor:
    """The vector of :data:`~slope_mm.ops.kernel_code.SCALARS`."""
    share = 0.0 if gradient == 'masked' else 1.0
    decay = decay if gradient == 'sr_ste' else 0.0
    with torch.inference_mode(False):
        return torch.tensor([codes.qn, codes.qp, codes.offset, n, share, decay])


class _Rows(NamedTuple):
    """Rows that a kernel works on at once, and where the weights around them are.

    Attributes:
        latent: Inputs of a kernel: ``[count, length]``, and the other members of its groups, as in
            :mod:`~slope_mm.ops.kernel_code`.
        where: Which rows of the weight they are.
    """

    latent: list[Tensor]
    where: slice


def _inner(w: Tensor, groups: Groups, where: slice) -> _Rows:
    """The rows of ``w`` but for the first and the last, whose neighbours may lie outside of it."""
    rows, length = w.shape[0] - 2, w.shape[1]
    flat, size, whole = w.view(-1), rows * length, groups.m * groups.kernel
    latent = [w[1:-1]]
    for distance in range(groups.kernel, whole, groups.kernel):
        for start in (length + distance, length + distance - whole):
            latent.append(flat[start : start + size].view(rows, length))
    return _Rows(latent, where)


def _pieces(w: Tensor, groups: Groups) -> list[_Rows]:
    """All rows, with two rows of anything around those at the edges.

    What lies outside of a group is read and not looked at, so it may be anything that is there.
    """
    count, length = w.shape
    if groups.m == 1:
        return [_Rows([w], slice(0, count))]
    if w.numel() <= SMALL or count < 4:
        padded = w.new_empty(count + 2, length)
        padded[1:-1] = w
        return [_inner(padded, groups, slice(0, count))]
    padded = w.new_empty(4, length)
    torch.stack((w[0], w[-1]), out=padded[1:3])
    edges = slice(0, count, count - 1)
    return [_inner(w, groups, slice(1, count - 1)), _inner(padded, groups, edges)]


def forward_pass(
    w: Tensor, step: Tensor, codes: Codes, mask: None, groups: Groups | None
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums, without keeping the mask."""
    groups = groups or DENSE
    kernel = _one('weight_forward', groups.m)
    member, scalars = _member(w.shape[1], groups), _scalars(codes, groups.n)
    step = positive(step).reshape(-1, 1).expand(w.shape[0], 1)
    compressed, by_row = torch.empty_like(w), w.new_empty(4, w.shape[0])
    for latent, where in _pieces(w, groups):
        targets = [compressed[where], *by_row[:, where]]
        given = [t if t.is_contiguous() else w.new_empty(t.shape) for t in targets]
        kernel([*latent, member, step[where].contiguous(), scalars, *given])
        _fill(targets, given)
    powers = by_row[:3]
    tied = _tied(by_row[3], w, groups)
    if tied is not None:
        compressed[tied], powers[:, tied], _ = weight_pass.forward_pass(
            w[tied], step[tied], codes, None, groups, sums=True
        )
    return compressed, powers


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    step: Tensor,
    codes: Codes,
    mask: None,
    groups: Groups | None,
    *,
    powers: Tensor,
    grad_scale: float,
    gradient: str,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.backward_pass`; finds mask and compressed weight again.

    The step's gradient is complete (:func:`slope_mm.ops.weight_pass.step_gradient`).
    """
    groups = groups or DENSE
    kernel = _one('weight_backward', groups.m)
    member = _member(w.shape[1], groups)
    scalars = _scalars(codes, groups.n, gradient, decay)
    count = w.shape[0]
    s = positive(step).reshape(-1, 1)
    if grad is None:
        grad = torch.zeros_like(w)
    if grad_powers is None:
        by_latent = by_level = w.new_zeros(count, 1)
    else:
        by_latent, by_level = (2 * grad_powers[0]).view(-1, 1), grad_powers[1].view(-1, 1)
    grad_w, sums = torch.empty_like(w), w.new_empty(2, count)
    for latent, where in _pieces(w, groups):
        targets = [grad_w[where], *sums[:, where]]
        given = [t if t.is_contiguous() else w.new_empty(t.shape) for t in targets]
        by_row = [x[where].contiguous() for x in (s.expand(count, 1), by_latent, by_level)]
        kernel([grad[where].contiguous(), *latent, member, *by_row, scalars, *given])
        _fill(targets, given)
    grad_step = sums[0].unsqueeze(1)
    tied = _tied(sums[1], w, groups)
    if tied is not None:
        rows, steps = w[tied], s.expand(count, 1)[tied]
        compressed, _, kept = weight_pass.forward_pass(
            rows, steps, codes, None, groups, sums=False, keep_mask=True
        )
        found, by_step = weight_pass.backward_pass(
            grad[tied],
            None if grad_powers is None else grad_powers[:, tied],
            rows,
            compressed,
            steps,
            codes,
            kept,
            groups=groups,
            gradient=gradient,
            decay=decay,
            wants_weight=True,
            wants_step=True,
        )
        assert found is not None and by_step is not None
        grad_w[tied], grad_step[tied] = found, by_step
    complete = step_gradient(grad_step, step, s, grad_powers, powers, grad_scale)
    return grad_w, complete


def _tied(kept_count: Tensor, w: Tensor, groups: Groups) -> Tensor | None:
    """Rows of which a kernel kept more than N of each group; None where there is none."""
    if groups.m == 1:
        return None
    # Not a comparison with "more than": what is not a number goes to the plain pass as well.
    tied = (kept_count != w.shape[1] // groups.m * groups.n).nonzero().flatten()
    return tied if tied.numel() else None


def _fill(targets: list[Tensor], given: list[Tensor]) -> None:
    for target, found in zip(targets, given, strict=True):
        if target is not found:
            target.copy_(found)


def _one(name: str, m: int) -> Callable[..., object]:
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
