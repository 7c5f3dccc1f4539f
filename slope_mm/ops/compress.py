"""W to its compressed form: mask and quantize as one differentiable operation.

    compressed = q(S(W; N, M); s, b)        (arXiv 2511.08360: sparsify first, quantize second)

Forward and backward are one pass each (:mod:`slope_mm.ops.weight_pass`). W, the step, the mask and
the compressed weight itself, which the layer's operator keeps anyway, are kept for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_mm.errors import RecipeError, TensorError, nearest
from slope_mm.ops import fused
from slope_mm.ops.quantization import Codes, positive
from slope_mm.ops.sparsity import NMPattern, require_finite
from slope_mm.ops.weight_pass import (
    Groups,
    as_rows,
    backward_pass,
    forward_pass,
    from_rows,
    step_gradient,
)

# How the gradient of the compressed weight reaches W.
GRADIENTS = {
    'ste': 'identity through the mask: pruned weights learn and can come back',
    'sr_ste': 'ste plus a decay of the pruned weights (arXiv 2102.04010)',
    'masked': 'no gradient to pruned weights',
    'soft': 'through a sigmoid around the threshold of each N:M group (arXiv 2003.00075)',
}
# The decay that the SR-STE paper found best for ResNets.
SR_STE_DECAY = 2e-4


class Compress(torch.autograd.Function):
    """``(w, step, mask) -> (compressed, powers)``."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor | None,
        mask: Tensor | None,
        codes: Codes | None,
        groups: Groups | None,
        axes: tuple[int, int],
        grad_scale: float,
        gradient: str,
        decay: float,
        sums: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        latent = as_rows(w, *axes)
        kept = None if mask is None else as_rows(mask.bool(), *axes)
        ctx.let_go, ctx.found = False, None
        ctx.kernels = fused.weight_kernels(latent, codes, mask, groups, gradient)
        if ctx.kernels is not None:
            rows, powers, ctx.found = ctx.kernels.forward_pass(latent, step, codes, kept, groups)
        else:
            s = None if step is None else positive(step).reshape(-1, 1)
            # A live mask is kept as bits; one that was given is somebody's already.
            rows, powers, kept = forward_pass(
                latent, s, codes, kept, groups, sums=sums, keep_mask=learns
            )
        compressed = from_rows(rows, tuple(w.shape), *axes)
        # Kernels find the compressed weight again.
        held = compressed if ctx.kernels is None else None
        ctx.save_for_backward(w, step, kept, held, powers)
        ctx.how = codes, groups, axes, grad_scale, gradient, decay
        if not sums:
            ctx.mark_non_differentiable(powers)
        return compressed, powers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_powers = grads
        w, step, kept, compressed, powers = ctx.__dict__.pop('unpacked', None) or ctx.saved_tensors
        codes, groups, axes, grad_scale, gradient, decay = ctx.how
        rows: Tensor | None
        grad_step: Tensor | None
        upstream = None if grad is None else as_rows(grad, *axes)
        if ctx.kernels is not None:
            found, ctx.found = ctx.found, None
            rows, grad_step = ctx.kernels.backward_pass(
                upstream,
                grad_powers,
                as_rows(w, *axes),
                step,
                codes,
                kept if found is None else found,
                groups,
                powers=powers,
                grad_scale=grad_scale,
                gradient=gradient,
                decay=decay,
            )
            rows = rows if ctx.needs_input_grad[0] else None
            grad_step = grad_step if ctx.needs_input_grad[1] else None
        else:
            s = None if step is None else positive(step).reshape(-1, 1)
            rows, grad_step = backward_pass(
                upstream,
                grad_powers,
                as_rows(w, *axes),
                as_rows(compressed, *axes),
                s,
                codes,
                kept,
                groups=groups,
                gradient=gradient,
                decay=decay,
                wants_weight=ctx.needs_input_grad[0],
                wants_step=ctx.needs_input_grad[1],
            )
            if grad_step is not None and s is not None:
                grad_step = step_gradient(grad_step, step, s, grad_powers, powers, grad_scale)
        grad_w = None if rows is None else from_rows(rows, tuple(w.shape), *axes)
        return grad_w, grad_step, *[None] * 9

    @staticmethod
    def let_go(node: Any) -> None:
        """Says that nobody holds what a graph node compressed: operators need not keep it either.

        What is found once more with it need not be kept until then.
        """
        node.let_go, node.found = True, None

    @staticmethod
    def again(node: Any) -> Tensor:
        """What the forward of a graph node compressed, computed once more; without a graph."""
        if 'unpacked' not in node.__dict__:
            # Activation checkpointing hands saved tensors out once.
            node.unpacked = node.saved_tensors
        w, step, kept, _, _ = node.unpacked
        codes, groups, axes, *_ = node.how
        with torch.no_grad():
            rows, _, node.found = node.kernels.forward_pass(
                as_rows(w, *axes), step, codes, kept, groups
            )
            return from_rows(rows, tuple(w.shape), *axes)


def compress_with_powers(
    w: Tensor,
    step: Tensor | None = None,
    codes: Codes | None = None,
    *,
    pattern: NMPattern | None = None,
    mask: Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    grad_scale: float = 1.0,
    gradient: str = 'ste',
    decay: float = SR_STE_DECAY,
    sums: bool = True,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Masks and quantizes a weight, and says how the result lies to it.

    The gradient of the compressed weight passes straight through to W. That of the sums is exact:
    the compressed weight counts as what it is almost everywhere, constant in W and linear in the
    step. (Sent straight through, a regularizer's gradient lets pruned weights grow, and the cosine
    falls: docs/method.md.)

    Args:
        w: Latent weight of any shape and floating dtype.
        step: Steps of shape :func:`~slope_mm.ops.step_shape`; None without quantization.
        codes: Code set; None without quantization.
        pattern: N:M pattern of which the mask is computed here.
        mask: Bool of ``w``'s shape, True where kept, in place of a pattern; None for dense.
        axes: Output and input channel axis of ``w``.
        grad_scale: Scale of the step's gradient.
        gradient: Name in :data:`GRADIENTS`. ``'soft'`` needs a pattern; a mask that is given is a
            constant, and passes gradients as ``'masked'`` does.
        decay: SR-STE's decay of pruned weights; the gradient to a pruned weight gains
            ``decay * w``.
        sums: Whether the sums are wanted.
        check_finite: Refuse NaN and infinity (a synchronisation on a GPU).

    Returns:
        ``(compressed, powers)``: the compressed weight, of ``w``'s shape and dtype (the arithmetic
        is fp32), exact zeros where masked; and ``[3, outputs]`` in fp32: ``w·w``, ``w·ŵ``, ``ŵ·ŵ``
        per output channel (the last two are zero without ``sums``).

    Raises:
        RecipeError: If the gradient's name is unknown.
        TensorError: If the steps do not fit, or ``w`` is not finite and ``check_finite``.
    """
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise RecipeError(
            f'gradient={gradient!r} is unknown; choose one of {sorted(GRADIENTS)}'
            f'{nearest(str(gradient), GRADIENTS)}'
        )
    if step is not None and step.numel() != 1 and step.numel() != w.shape[axes[0]]:
        raise TensorError(
            f'steps of shape {tuple(step.shape)} fit no weight of shape {tuple(w.shape)} with'
            f' output channels on axis {axes[0]}; give one step, or one per output channel'
        )
    if mask is not None and mask.shape != w.shape:
        raise TensorError(
            f'a mask of shape {tuple(mask.shape)} fits no weight of shape {tuple(w.shape)}; give'
            ' one of the same shape'
        )
    groups = None
    if pattern is not None:
        pattern.check(w, axes[1])
        kernel = math.prod(size for i, size in enumerate(w.shape) if i not in axes)
        groups = Groups(pattern.n, pattern.m, kernel)
    if codes is None or step is None:
        codes = step = None
    # Within a function's forward gradients are always off.
    learns = torch.is_grad_enabled() and (
        w.requires_grad or (step is not None and step.requires_grad)
    )
    compressed, powers = Compress.apply(
        w, step, mask, codes, groups, axes, grad_scale, gradient, decay, sums, learns
    )
    if check_finite and not math.isfinite(powers.detach()[0].sum().item()):
        # Squares may overflow on finite weights.
        require_finite(w)
    return compressed, powers


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
        step: One step, or one per index of a single axis of ``w`` (see
            :func:`~slope_mm.ops.step_shape`); None without quantization.
        mask: Bool of ``w``'s shape, True where kept; None for dense.
        codes: Code set; None without quantization.
        grad_scale: Scale of the step's gradient.
        gradient: Name in :data:`GRADIENTS`; ``'soft'`` passes as ``'masked'`` does, as the mask is
            given.
        decay: SR-STE's decay of pruned weights; the gradient to a pruned weight gains
            ``decay * w``.

    Returns:
        The compressed weight, of ``w``'s shape and dtype (the arithmetic is fp32). Masked weights
        are exact zeros.

    Raises:
        RecipeError: If the gradient's name is unknown.
    """
    axis = 0
    if step is not None and step.numel() > 1:
        if step.dim() != w.dim():
            raise TensorError(
                f'steps of shape {tuple(step.shape)} do not say which axis of {tuple(w.shape)} they'
                ' are for; give one step, or a shape of slope_mm.ops.step_shape'
            )
        axis = max(range(step.dim()), key=lambda i: step.shape[i])
    axes = (axis, 1 - axis if axis < 2 else 0)
    compressed, _ = compress_with_powers(
        w,
        step,
        codes,
        mask=mask,
        axes=axes,
        grad_scale=grad_scale,
        gradient=gradient,
        decay=decay,
        sums=False,
    )
    return compressed
