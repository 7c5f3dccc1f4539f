"""Quantization with a learned step as a differentiable operation (LSQ, arXiv 1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_mm.ops.activation_pass import quantize_backward, quantize_forward
from slope_mm.ops.compress import compress_weight
from slope_mm.ops.quantization import Codes


class QuantizeLSQ(torch.autograd.Function):
    """Quantizes with one step; only the values before quantization are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, codes: Codes, grad_scale: float) -> Tensor:
        ctx.codes, ctx.grad_scale = codes, grad_scale
        ctx.save_for_backward(x, step)
        return quantize_forward(x, step, codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.__dict__.pop('unpacked', None) or ctx.saved_tensors
        grad_x, grad_step = quantize_backward(grads[0], x, step, ctx.codes, ctx.grad_scale)
        return grad_x if ctx.needs_input_grad[0] else None, grad_step, None, None

    @staticmethod
    def again(node: Any) -> Tensor:
        """What the forward of a graph node returned, computed once more; without a graph."""
        if 'unpacked' not in node.__dict__:
            # Activation checkpointing hands saved tensors out once.
            node.unpacked = node.saved_tensors
        x, step = node.unpacked
        with torch.no_grad():
            return quantize_forward(x, step, node.codes)


def lsq_quantize(
    x: Tensor,
    step: Tensor,
    qn: int,
    qp: int,
    grad_scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """``round(clip(x / step, qn, qp)) * step``, differentiable in ``x`` and ``step`` (LSQ).

    The gradient to ``x`` passes where ``qn < x / step < qp``; the gradient to the step is LSQ's,
    times ``grad_scale``. The arithmetic is fp32 and the result has ``x``'s dtype.

    Args:
        x: Values of any shape and floating dtype.
        step: One step, or one per index of a single axis of ``x``; their magnitude counts.
        qn: Smallest code.
        qp: Largest code.
        grad_scale: Scale of the step's gradient; LSQ takes ``1 / sqrt(numel * qp)``.
        offset: 0.5 for the ``odd`` set.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    bits = max(1, math.ceil(math.log2(qp - qn + 1)))
    codes = Codes(bits, qn, qp, offset)
    if step.numel() == 1:
        return QuantizeLSQ.apply(x, step, codes, grad_scale)
    return compress_weight(x, step, None, codes, grad_scale=grad_scale)
