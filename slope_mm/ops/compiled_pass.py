"""The weight pass through ``torch.compile``: the main path fused into one loop each way.

The members of a group are unrolled, so that mask, rounding, clip range and sums become one vector
loop over the kernel positions. The result is that of the plain pass, bit for bit but for the order
in which sums are added up.

It pays on a CPU where a vector loop fits the layer: 3x3 kernels and groups of up to 8. The first
use compiles for tens of seconds; inductor keeps the result on disk. Measurements:
docs/performance.md.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slope_mm.ops.quantization import Codes
from slope_mm.ops.selection import kth_largest
from slope_mm.ops.weight_pass import DENSE, Groups

# Beyond this the unrolled network spills registers: 2:16 is four times slower than the plain pass.
LARGEST_GROUP = 8
# Along one or two positions there is no vector loop; 7x7 is one layer, not worth a kernel.
KERNELS = (9,)


def fits(
    w: Tensor, codes: Codes | None, mask: Tensor | None, groups: Groups | None, gradient: str
) -> bool:
    """Whether the compiled pass knows this case; the plain one knows all."""
    _, m, kernel = groups or DENSE
    return (
        w.dtype == torch.float32
        and codes is not None
        and mask is None
        and m <= LARGEST_GROUP
        and kernel in KERNELS
        and gradient == 'ste'
    )


def _kept(members: tuple[Tensor, ...], n: int) -> list[Tensor]:
    """Which members are among their group's ``n`` largest; lower indices win ties."""
    if n == len(members):
        return [torch.ones_like(member, dtype=torch.bool) for member in members]
    magnitudes = tuple(member.abs() for member in members)
    threshold = kth_largest(magnitudes, n)
    above = [magnitude > threshold for magnitude in magnitudes]
    room = n - sum(mark.to(torch.int32) for mark in above)
    kept = []
    for magnitude, mark in zip(magnitudes, above, strict=True):
        tied = magnitude == threshold
        kept.append(mark | (tied & (room > 0)))
        room = room - tied.to(torch.int32)
    return kept


def _level(x: Tensor, step: Tensor, low: float, high: float, offset: float) -> Tensor:
    return (torch.clamp(torch.round(x / step - offset), low, high) + offset) * step


def _forward(
    w: Tensor, step: Tensor, *, n: int, low: float, high: float, offset: float
) -> tuple[Tensor, ...]:
    members = w.unbind(2)
    levels = [
        torch.where(keep, _level(x, step, low, high, offset), 0.0)
        for x, keep in zip(members, _kept(members, n), strict=True)
    ]
    compressed = torch.stack(levels, 2)
    return (
        compressed,
        (w * w).sum((1, 2, 3)),
        (w * compressed).sum((1, 2, 3)),
        (compressed * compressed).sum((1, 2, 3)),
    )


def _backward(
    grad: Tensor,
    w: Tensor,
    step: Tensor,
    by_latent: Tensor,
    by_level: Tensor,
    *,
    n: int,
    low: float,
    high: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    members = w.unbind(2)
    total, by_step = [], []
    for x, g, keep in zip(members, grad.unbind(2), _kept(members, n), strict=True):
        scaled = x / step
        level = torch.where(keep, _level(x, step, low, high, offset), 0.0)
        inside = (scaled > low + offset) & (scaled < high + offset)
        passed = torch.where(inside | ~keep, g, 0.0)
        by_step.append(torch.where(keep, g * (level / step) - passed * scaled, 0.0))
        total.append(passed + (by_latent * x + by_level * level))
    return torch.stack(total, 2), torch.stack(by_step, 2).sum((1, 2, 3))


@functools.cache
def _kernel(function: types.FunctionType, n: int, m: int) -> Callable[..., Any]:
    """The compiled function of a pattern.

    Each has a code object of its own: torch counts recompilations by code object.
    """
    name = f'slope{function.__name__}_{n}_{m}'
    made = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    made.__kwdefaults__ = {'n': n}
    return torch.compile(made, dynamic=True)


def _grouped(rows: Tensor, m: int, kernel: int) -> Tensor:
    """``[rows, groups, m, kernel]`` with the last two sizes known to the compiler."""
    view = rows.view(rows.shape[0], -1, m, kernel)
    torch._dynamo.mark_static(view, 2)
    torch._dynamo.mark_static(view, 3)
    return view


def forward_pass(
    w: Tensor, step: Tensor, codes: Codes, mask: None, groups: Groups | None
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums, without keeping the mask."""
    n, m, kernel = groups or DENSE
    compressed, *sums = _kernel(_forward, n, m)(
        _grouped(w, m, kernel),
        step.view(-1, 1, 1),
        low=float(codes.qn),
        high=float(codes.qp),
        offset=codes.offset,
    )
    return compressed.view(w.shape), torch.stack(sums)


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    step: Tensor,
    codes: Codes,
    mask: None,
    groups: Groups | None,
    *,
    gradient: str,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.backward_pass`; finds the compressed weight again, too."""
    n, m, kernel = groups or DENSE
    if grad is None:
        grad = torch.zeros_like(w)
    if grad_powers is None:
        grad_powers = torch.zeros(3, w.shape[0], device=w.device)
    grad_w, grad_step = _kernel(_backward, n, m)(
        _grouped(grad, m, kernel),
        _grouped(w, m, kernel),
        step.view(-1, 1, 1),
        2 * grad_powers[0].view(-1, 1, 1),
        grad_powers[1].view(-1, 1, 1),
        low=float(codes.qn),
        high=float(codes.qp),
        offset=codes.offset,
    )
    return grad_w.view(w.shape), grad_step.view(-1, 1)
