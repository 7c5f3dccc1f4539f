"""The weight pass and the activation quantizer as Triton kernels, for CUDA.

One kernel each way: a weight is read once on the way in, and once more with the gradient on the way
back, where mask and compressed weight are found again instead of kept. A program takes one row (an
output channel) and adds its sums up itself, so results do not depend on the order in which programs
run. Values are those of the plain passes bit for bit, sums but for their order.

Triton is an optional package, and this module is imported where it is used. With
``TRITON_INTERPRET=1`` the kernels run on a CPU, one operation at a time: for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from slope_mm.ops.quantization import Codes
from slope_mm.ops.triton_kernels import (
    backward_kernel,
    forward_kernel,
    quantize_backward_kernel,
    quantize_kernel,
)
from slope_mm.ops.weight_pass import DENSE, Groups

# Values of a row that a program holds at once, and those of an activation.
TILE = 2048
# A product that is contracted into a sum would round differently from the plain passes.
OPTIONS = dict(enable_fp_fusion=False)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever device the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _shape(w: Tensor, groups: Groups | None) -> dict[str, Any]:
    n, m, kernel = groups or DENSE
    width = triton.next_power_of_2(m)
    lanes = min(triton.next_power_of_2(max(1, w.shape[1] // m)), max(1, TILE // width))
    return dict(kernel=kernel, N=n, M=m, WIDTH=width, LANES=lanes)


def _code_range(codes: Codes | None) -> dict[str, float]:
    if codes is None:
        return dict(low=0.0, high=0.0, offset=0.0)
    return dict(low=float(codes.qn), high=float(codes.qp), offset=codes.offset)


def forward_pass(
    w: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    groups: Groups | None,
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.forward_pass` with all sums, which the mask is not kept of.

    Args:
        w: ``[rows, length]``, contiguous, fp32, fp16 or bf16.
        step: Positive fp32 steps ``[rows, 1]`` or ``[1, 1]``; None without quantization.
        codes: The code set; None without quantization.
        mask: Bool like ``w``, contiguous; None where ``groups`` decide, or for dense.
        groups: N:M groups to keep the largest of.

    Returns:
        ``(compressed, sums)``: like ``w``; ``[3, rows]`` in fp32.
    """
    compressed = torch.empty_like(w)
    powers = torch.empty(3, w.shape[0], dtype=torch.float32, device=w.device)
    with _on(w):
        forward_kernel[(w.shape[0],)](
            w,
            w if step is None else step,
            w if mask is None else mask.view(torch.uint8),
            compressed,
            powers,
            *w.shape,
            step_stride=int(step is not None and step.shape[0] > 1),
            QUANTIZED=codes is not None,
            MASKED=mask is not None,
            **_code_range(codes),
            **_shape(w, groups if mask is None else None),
            **OPTIONS,
        )
    return compressed, powers


def backward_pass(
    grad: Tensor | None,
    grad_powers: Tensor | None,
    w: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    mask: Tensor | None,
    groups: Groups | None,
    *,
    gradient: str,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.weight_pass.backward_pass` from W alone.

    Args:
        grad: Gradient of the compressed rows, contiguous; None for zero.
        grad_powers: Gradient of the sums, ``[3, rows]``; None for zero.
        w: As in the forward pass.
        step: As in the forward pass.
        codes: As in the forward pass.
        mask: As in the forward pass.
        groups: As in the forward pass.
        gradient: Name in :data:`~slope_mm.ops.GRADIENTS`.
        decay: SR-STE's.

    Returns:
        ``(grad_w, grad_step)``: like ``w``; and ``[rows, 1]`` in fp32.
    """
    grad_w = torch.empty_like(w)
    grad_step = torch.empty(w.shape[0], 1, dtype=torch.float32, device=w.device)
    with _on(w):
        backward_kernel[(w.shape[0],)](
            w if grad is None else grad,
            w if grad_powers is None else grad_powers.contiguous(),
            w,
            w if step is None else step,
            w if mask is None else mask.view(torch.uint8),
            grad_w,
            grad_step,
            *w.shape,
            step_stride=int(step is not None and step.shape[0] > 1),
            decay=decay,
            QUANTIZED=codes is not None,
            MASKED=mask is not None,
            TASK=grad is not None,
            SUMS=grad_powers is not None,
            GRADIENT=gradient,
            **_code_range(codes),
            **_shape(w, groups if mask is None else None),
            **OPTIONS,
        )
    return grad_w, grad_step


def quantize_forward(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """:func:`slope_mm.ops.activation_pass.quantize_forward` of a dense tensor.

    Args:
        x: Values without gaps in memory, fp32, fp16 or bf16.
        step: The positive step, one fp32 element.
        codes: The code set.

    Returns:
        Tensor of ``x``'s shape, strides and dtype.
    """
    result = torch.empty_like(x)
    if x.numel():
        with _on(x):
            quantize_kernel[(triton.cdiv(x.numel(), TILE),)](
                x, step, result, x.numel(), TILE=TILE, **_code_range(codes), **OPTIONS
            )
    return result


def quantize_backward(grad: Tensor, x: Tensor, step: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """:func:`slope_mm.ops.activation_pass.quantize_backward` of dense tensors.

    Args:
        grad: Gradient of the quantized values, with ``x``'s strides.
        x: As in the forward pass.
        step: As in the forward pass.
        codes: As in the forward pass.

    Returns:
        ``(grad_x, grad_step)``: like ``x``; and the step's, an fp64 scalar, before LSQ's scale.
    """
    result = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), TILE)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    if programs:
        with _on(x):
            quantize_backward_kernel[(programs,)](
                grad,
                x,
                step,
                result,
                partial,
                x.numel(),
                TILE=TILE,
                **_code_range(codes),
                **OPTIONS,
            )
    return result, partial.sum(dtype=torch.float64)
