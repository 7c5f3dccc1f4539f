"""Quantizing with a single step, in one pass each way over tensors of any size.

On a CPU the values are taken in blocks that stay in a core's cache. The backward pass needs the
values before quantization alone: rounding again is cheaper than keeping what it gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slope_mm.ops import fused
from slope_mm.ops.quantization import Codes, positive, scaled_gradient
from slope_mm.ops.selection import BLOCK, Scratch

# Finite in fp32: times a gradient of zero it stays zero, which infinity does not.
_LARGEST = 3e38


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's values in memory order, whatever order its axes have."""
    return x.as_strided((x.numel(),), (1,))


def _dense(x: Tensor) -> Tensor:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous() or channels_last else x.contiguous()


def _block(x: Tensor) -> int:
    return BLOCK * torch.get_num_threads() if x.device.type == 'cpu' else max(1, x.numel())


def _buffer(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for one block of values."""
    block = _flat(x)[: _block(x)].unsqueeze(0)
    return Scratch(block, dtype)(name, block)[0]


def quantize_forward(
    x: Tensor, step: Tensor, codes: Codes, room: Callable[[Tensor], Tensor] = torch.empty_like
) -> Tensor:
    """``(clip(round(x / step - offset), qn, qp) + offset) * step`` with one step.

    Args:
        x: Values of any shape and floating dtype.
        step: The step, one element; its magnitude counts.
        codes: The code set.
        room: Where the result goes: a tensor like the dense one that it is called with.

    Returns:
        Tensor of ``x``'s shape and dtype; the arithmetic is fp32 or better.
    """
    x = _dense(x)
    result = room(x)
    kernels = fused.activation_kernels(x)
    if kernels is not None:
        kernels.quantize_forward(x, step, codes, result)
        return result
    s = positive(step).reshape(1)
    size = _block(x)
    precision = torch.promote_types(x.dtype, s.dtype)
    scratch = None if x.dtype == precision else _buffer('level', x, precision)
    for block, target in zip(_flat(x).split(size), _flat(result).split(size), strict=True):
        level = torch.div(block, s, out=target if scratch is None else scratch[: block.numel()])
        _round(level, codes).mul_(s)
        if scratch is not None:
            target.copy_(level)
    return result


def _round(scaled: Tensor, codes: Codes) -> Tensor:
    """Rounds ``x / step`` to levels, in place."""
    if codes.offset:
        scaled.sub_(codes.offset)
    scaled.round_().clamp_(codes.qn, codes.qp)
    if codes.offset:
        scaled.add_(codes.offset)
    return scaled


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, codes: Codes, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """LSQ's gradients (arXiv 1902.08153).

    Args:
        grad: Gradient of the quantized values.
        x: The values before.
        step: The step, one element; its magnitude counts.
        codes: The code set.
        grad_scale: Scale of the step's gradient.

    Returns:
        ``(grad_x, grad_step)``: ``grad`` where the clip range was not left, zero elsewhere, like
        ``x``; and like ``step``.
    """
    x = _dense(x)
    result = torch.empty_like(x)
    if grad.stride() != result.stride():
        # In the order of x in memory.
        grad = torch.empty_like(result, dtype=grad.dtype).copy_(grad)
    kernels = fused.activation_kernels(x)
    if kernels is not None:
        return kernels.quantize_backward(grad, x, step, codes, grad_scale)
    s = positive(step).reshape(1)
    values, upstream, target = _flat(x), _flat(grad), _flat(result)
    size = _block(x)
    precision = torch.promote_types(x.dtype, s.dtype)
    low, high = codes.qn + codes.offset, codes.qp + codes.offset
    buffer = _buffer('scaled', x, precision)
    hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, x.numel(), size):
        block = values[start : start + size]
        scaled = buffer[: block.numel()]
        torch.div(block, s, out=scaled)
        # Outside the clip range the gradient is zero, and zero times infinity has to be zero.
        scaled.clamp_(-_LARGEST, _LARGEST)
        arriving = upstream[start : start + size].to(precision)
        passed = target[start : start + size]
        if passed.dtype == precision:
            hardtanh_backward(arriving, scaled, low, high, grad_input=passed)
        else:
            passed.copy_(torch.ops.aten.hardtanh_backward(arriving, scaled, low, high))
        inside = torch.dot(passed.to(precision), scaled)
        _round(scaled, codes)
        total += torch.dot(arriving, scaled) - inside
    return result, scaled_gradient(total, step, grad_scale)
