"""W to its compressed form: mask and quantize as one differentiable operation.

    compressed = q(S(W; N, M); s, b)        (arXiv 2511.08360: sparsify first, quantize second)

Forward and backward live in one autograd function that keeps W, the step and the mask alive and
recomputes everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope_mm.errors import RecipeError, nearest
from slope_mm.ops.quantization import Codes, from_codes, positive, step_terms, to_codes

# How the gradient of the compressed weight reaches W.
GRADIENTS = {
    'ste': 'identity through the mask: pruned weights learn and can come back',
    'sr_ste': 'ste plus a decay of the pruned weights (arXiv 2102.04010)',
    'masked': 'no gradient to pruned weights',
}
# The decay that the SR-STE paper found best for ResNets.
SR_STE_DECAY = 2e-4


class _MaskedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor | None,
        mask: Tensor | None,
        codes: Codes | None,
        grad_scale: float,
        gradient: str,
        decay: float,
    ) -> Tensor:
        ctx.save_for_backward(w, step, mask)
        ctx.codes, ctx.grad_scale, ctx.gradient, ctx.decay = codes, grad_scale, gradient, decay
        if codes is None or step is None:
            return w.clone() if mask is None else w * mask
        s = positive(step)
        compressed = from_codes(to_codes(w, s, codes), s, codes)
        if mask is not None:
            compressed.mul_(mask)
        return compressed.to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        w, step, mask = ctx.saved_tensors
        passes: Tensor | None = None
        grad_step = None
        if ctx.codes is not None and step is not None:
            passes, d_step = step_terms(w, positive(step), ctx.codes)
            if ctx.needs_input_grad[1]:
                grad_step = _step_gradient(d_step, grad, mask, step, ctx.grad_scale)
        if not ctx.needs_input_grad[0]:
            return None, grad_step, None, None, None, None, None
        if mask is not None:
            if ctx.gradient == 'masked':
                passes = mask if passes is None else passes & mask
            elif passes is not None:
                # The clip range belongs to q, which a pruned weight enters as zero: always inside.
                passes = passes | mask.logical_not()
        grad_w = grad if passes is None else grad * passes
        if ctx.gradient == 'sr_ste' and mask is not None:
            grad_w = grad_w + w * mask.logical_not() * ctx.decay
        return grad_w, grad_step, None, None, None, None, None


class _StepPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compressed: Tensor, step: Tensor, grad_scale: float) -> Tensor:
        ctx.save_for_backward(compressed, step)
        ctx.grad_scale = grad_scale
        return compressed.view_as(compressed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compressed, step = ctx.saved_tensors
        # (code + offset) * step with the codes held fixed: the derivative is the value by the step.
        level = compressed / positive(step)
        return None, _step_gradient(level, grads[0], None, step, ctx.grad_scale), None


def _step_gradient(
    d_step: Tensor, grad: Tensor, mask: Tensor | None, step: Tensor, grad_scale: float
) -> Tensor:
    """Sums a weight's step derivatives; consumes ``d_step``."""
    d_step.mul_(grad)
    if mask is not None:
        d_step.mul_(mask)
    summed = d_step.sum_to_size(step.shape).mul_(grad_scale)
    # positive() folds a negative step, and with it the derivative.
    return (summed * torch.where(step < 0, -1.0, 1.0)).to(step.dtype)


def constant_in_latent(
    compressed: Tensor, step: Tensor | None, *, grad_scale: float = 1.0
) -> Tensor:
    """A compressed weight as what it is almost everywhere: constant in W, linear in the step.

    What a regularizer that compares W with its compressed form has to differentiate. The
    straight-through estimator is no gradient of such a loss: it lets pruned weights grow, and the
    cosine falls (docs/method.md).

    Args:
        compressed: What :func:`compress_weight` made with ``step``.
        step: Steps; None without quantization.
        grad_scale: Scale of the step's gradient.

    Returns:
        The same values, differentiable in the step alone.
    """
    if step is None:
        return compressed.detach()
    return _StepPath.apply(compressed.detach(), step, grad_scale)


def compress_weight(
    w: Tensor,
    step: Tensor | None = None,
    mask: Tensor | None = None,
    codes: Codes | None = None,
    *,
    grad_scale: float = 1.0,
    gradient: str = 'ste',
    decay: float = SR_STE_DECAY,
) -> Tensor:
    """Masks and quantizes a weight; the gradient passes straight through.

    Args:
        w: Latent weight of any shape and floating dtype.
        step: Steps that broadcast to ``w`` (see :func:`~slope_mm.ops.step_shape`); None without
            quantization.
        mask: Bool of ``w``'s shape, True where kept; None for dense.
        codes: Code set; None without quantization.
        grad_scale: Scale of the step's gradient.
        gradient: ``'ste'``, ``'sr_ste'`` or ``'masked'``.
        decay: SR-STE's decay of pruned weights; the gradient to a pruned weight gains
            ``decay * w``.

    Returns:
        The compressed weight, of ``w``'s shape and dtype (the arithmetic is fp32). Masked weights
        are exact zeros.

    Raises:
        RecipeError: If the gradient's name is unknown.
    """
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise RecipeError(
            f'gradient={gradient!r} is unknown; choose one of {sorted(GRADIENTS)}'
            f'{nearest(str(gradient), GRADIENTS)}'
        )
    return _MaskedQuantize.apply(w, step, mask, codes, grad_scale, gradient, decay)
