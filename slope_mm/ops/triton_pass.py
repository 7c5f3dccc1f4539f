"""The weight pass and the activation quantizer as Triton kernels, for CUDA.

One kernel each way: a weight is read once on the way in, and once more with the gradient on the way
back, where mask and compressed weight are found again instead of kept. A program takes one row (an
output channel) and adds its sums up itself, so results do not depend on the order in which programs
run. Values are those of the plain passes bit for bit, sums but for their order.

Triton is an optional package, and this module is imported where it is used. With
``TRITON_INTERPRET=1`` the kernels run on a CPU, one operation at a time: for tests.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from slope_mm.ops.quantization import SMALLEST_STEP, Codes
from slope_mm.ops.triton_kernels import (
    backward_kernel,
    backward_many_kernel,
    forward_kernel,
    forward_many_kernel,
    quantize_backward_kernel,
    quantize_kernel,
    step_gradient_kernel,
)
from slope_mm.ops.weight_pass import DENSE, Groups

# Values of a row that a program holds at once.
TILE = 1024
# Values of an activation that a program holds at once, and how often its backward does so.
ACTIVATION_TILE, TILES = 1024, 4
# A product that is contracted into a sum would round differently from the plain passes.
OPTIONS = dict(enable_fp_fusion=False)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever device the tensors are on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@functools.cache
def shape_of(length: int, groups: Groups) -> dict[str, Any]:
    n, m, kernel = groups
    whole = kernel == 1 < m and m == triton.next_power_of_2(m)
    # Two widths, as every other one is compiled for itself.
    lanes = max(128, TILE // triton.next_power_of_2(m)) if length > 64 * m else 64
    warps = min(8, lanes // 32)
    return dict(KERNEL=kernel, N=n, M=m, LANES=lanes, WHOLE=whole, num_warps=warps, **OPTIONS)


@functools.cache
def code_range(codes: Codes | None) -> dict[str, float]:
    if codes is None:
        return dict(low=0.0, high=0.0, offset=0.0, smallest=SMALLEST_STEP)
    low, high = float(codes.qn), float(codes.qp)
    return dict(low=low, high=high, offset=codes.offset, smallest=SMALLEST_STEP)


def try_out(device: torch.device) -> None:
    """Runs a kernel, for what it raises where Triton cannot compile.

    Raises:
        RuntimeError: If the kernel computes something else.
    """
    x = torch.tensor([-1.0, 0.3, 0.6, 9.0], device=device)
    result = torch.empty_like(x)
    quantize_forward(x, x.new_ones(1), Codes(2, -1, 1, 0.0), result)
    found = result.tolist()
    if found != [-1.0, 0.0, 1.0, 1.0]:
        raise RuntimeError(f'rounding {x.tolist()} gave {found}')


def forward_pass(
    w: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    groups: Groups | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums; the mask is found again.

    Args:
        w: ``[rows, length]``, contiguous, fp32, fp16 or bf16.
        step: Learned steps as they are, contiguous: one, or one a row; None without quantization.
        codes: The code set; None without quantization.
        mask: Bool like ``w``, contiguous; None where ``groups`` decide, or for dense.
        groups: N:M groups to keep the largest of.

    Returns:
        ``(compressed, sums, mask)``: like ``w``; ``[3, rows]`` in fp32; the mask as given.
    """
    compressed = torch.empty_like(w)
    powers = torch.empty(3, w.shape[0], dtype=torch.float32, device=w.device)
    groups = DENSE if groups is None or mask is not None else groups
    with _on(w):
        forward_kernel[(w.shape[0],)](
            w,
            w if step is None else step,
            w if mask is None else mask.view(torch.uint8),
            compressed,
            powers,
            *w.shape,
            step_stride=int(step is not None and step.numel() > 1),
            QUANTIZED=codes is not None,
            MASKED=mask is not None,
            **code_range(codes),
            **shape_of(w.shape[1], groups),
        )
    return compressed, powers, mask


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    groups: Groups | None,
    *,
    powers: Tensor,
    grad_scale: float,
    gradient: str,
    decay: float,
) -> tuple[Tensor, Tensor | None]:
    """:func:`slope_mm.ops.weight_pass.backward_pass` from W alone, the step's gradient complete.

    Args:
        grad: Gradient of the compressed rows, contiguous; None for zero.
        grad_powers: Gradient of the sums, ``[3, rows]``; None for zero.
        w: As in the forward pass.
        step: As in the forward pass.
        codes: As in the forward pass.
        mask: As in the forward pass.
        groups: As in the forward pass.
        powers: The forward pass's sums.
        grad_scale: Scale of the step's gradient.
        gradient: Name in :data:`~slope_mm.ops.GRADIENTS`.
        decay: SR-STE's.

    Returns:
        ``(grad_w, grad_step)``: like ``w``; and like ``step``.
    """
    grad_w = torch.empty_like(w)
    by_row = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    groups = DENSE if groups is None or mask is not None else groups
    if grad_powers is not None and grad_powers.stride(1) != 1:
        grad_powers = grad_powers.contiguous()
    with _on(w):
        backward_kernel[(w.shape[0],)](
            w if grad is None else grad,
            w if grad_powers is None else grad_powers,
            w,
            w if step is None else step,
            powers,
            w if mask is None else mask.view(torch.uint8),
            grad_w,
            by_row,
            *w.shape,
            step_stride=int(step is not None and step.numel() > 1),
            powers_stride=0 if grad_powers is None else grad_powers.stride(0),
            decay=decay,
            grad_scale=grad_scale,
            QUANTIZED=codes is not None,
            MASKED=mask is not None,
            TASK=grad is not None,
            SUMS=grad_powers is not None,
            GRADIENT=gradient,
            **code_range(codes),
            **shape_of(w.shape[1], groups),
        )
    if step is None:
        return grad_w, None
    if step.numel() == 1 < w.shape[0]:
        by_row = by_row.sum()
    return grad_w, by_row.reshape(step.shape).to(step.dtype)


def quantize_forward(x: Tensor, step: Tensor, codes: Codes, result: Tensor) -> None:
    """:func:`slope_mm.ops.activation_pass.quantize_forward` of a dense tensor.

    Args:
        x: Values without gaps in memory, fp32, fp16 or bf16.
        step: The learned step as it is, one element.
        codes: The code set.
        result: What is filled, of ``x``'s shape, strides and dtype.
    """
    count = x.numel()
    if count:
        with _on(x):
            quantize_kernel[(triton.cdiv(count, ACTIVATION_TILE),)](
                x, step, result, count, TILE=ACTIVATION_TILE, **code_range(codes), **OPTIONS
            )


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, codes: Codes, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.activation_pass.quantize_backward` of dense tensors.

    Args:
        grad: Gradient of the quantized values, with ``x``'s strides.
        x: As in the forward pass.
        step: As in the forward pass.
        codes: As in the forward pass.
        grad_scale: Scale of the step's gradient.

    Returns:
        ``(grad_x, grad_step)``: like ``x``; and like ``step``.
    """
    result, grad_step = torch.empty_like(x), torch.empty_like(step)
    count = x.numel()
    programs = triton.cdiv(count, ACTIVATION_TILE * TILES)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    with _on(x):
        if count:
            quantize_backward_kernel[(programs,)](
                grad,
                x,
                step,
                result,
                partial,
                count,
                TILE=ACTIVATION_TILE,
                TILES=TILES,
                **code_range(codes),
                **OPTIONS,
            )
        step_gradient_kernel[(1,)](partial, step, grad_step, programs, grad_scale, TILE=1024)
    return result, grad_step


def forward_many(table: Any, compressed: Tensor, powers: Tensor) -> None:
    """:func:`forward_pass` of the weights of a table of :mod:`slope_mm.ops.compress_many`.

    Args:
        table: The table.
        compressed: Takes the compressed weights, end to end.
        powers: Takes the sums of all rows, ``[3, rows]``.
    """
    rows = powers.shape[1]
    with _on(compressed):
        forward_many_kernel[(rows,)](
            table.table, table.owner, compressed, powers, rows, **table.options
        )


def backward_many(
    table: Any,
    grad: Tensor,
    grad_powers: Tensor | None,
    powers: Tensor,
    grad_w: Tensor,
    grad_step: Tensor,
) -> None:
    """:func:`backward_pass` of the weights of a table.

    Args:
        table: The table.
        grad: Gradients of the compressed weights, end to end.
        grad_powers: Gradients of the sums, ``[3, rows]``, contiguous; None for zero.
        powers: The forward pass's sums.
        grad_w: Takes those of the weights; may be ``grad``.
        grad_step: Takes those of the steps, ``[rows]``; may not be ``powers``.
    """
    rows = powers.shape[1]
    with _on(grad):
        backward_many_kernel[(rows,)](
            table.table,
            table.owner,
            table.scales,
            grad,
            powers if grad_powers is None else grad_powers,
            powers,
            grad_w,
            grad_step,
            rows,
            rows,
            SUMS=grad_powers is not None,
            GRADIENT=table.gradient,
            **table.options,
        )
