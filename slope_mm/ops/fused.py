"""Whether fused kernels take the place of the plain passes, and which.

Off unless asked for (``optim_wrapper.compile=True``, :func:`use_fused`): on a CPU the first use
compiles for tens of seconds, which a short run does not earn back. On CUDA they are Triton's
(:mod:`slope_mm.ops.triton_pass`), on a CPU those that AOTInductor makes
(:mod:`slope_mm.ops.compiled_pass`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from slope_mm.ops.quantization import Codes
from slope_mm.ops.tracing import is_compiling
from slope_mm.ops.weight_pass import Groups

# A soft mask's gradient needs whole groups at once.
TRITON_GRADIENTS = ('ste', 'sr_ste', 'masked')

_enabled = False


def use_fused(enabled: bool) -> None:
    """Turns the fused kernels on or off for this process."""
    global _enabled
    _enabled = bool(enabled)


def fused_enabled() -> bool:
    """Whether fused kernels are asked for."""
    return _enabled


def saves_memory(weight: Tensor) -> bool:
    """Whether a compressed weight is better made again for the backward than held.

    On a CPU it is: its pages are the kernel's to clear. A GPU's step is long in memory that
    activations take, and waits for Python.
    """
    return _enabled and weight.device.type == 'cpu'


@contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Scope in which the fused kernels are on (or off)."""
    before = _enabled
    use_fused(enabled)
    try:
        yield
    finally:
        use_fused(before)


def triton_enabled(x: Tensor) -> bool:
    """Whether Triton's kernels are asked for, and to be had where a tensor is."""
    return _enabled and not is_compiling() and _triton_runs(x)


def _triton_runs(x: Tensor) -> bool:
    """Whether Triton is there, and the tensor where it computes (its interpreter takes any)."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if not x.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return False
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is there in a version that has what the kernels use."""
    if importlib.util.find_spec('triton') is None:
        return False
    # The distribution has other names beside nightly builds of torch.
    import triton

    return int(triton.__version__.partition('.')[0]) >= 3


def weight_kernels(
    rows: Tensor, codes: Codes | None, mask: Tensor | None, groups: Groups | None, gradient: str
) -> ModuleType | None:
    """The module whose ``forward_pass`` and ``backward_pass`` are to be used.

    None stands for the plain ones of :mod:`slope_mm.ops.weight_pass`, which know every case.
    """
    if not _enabled or is_compiling():
        return None
    if _triton_runs(rows) and gradient in TRITON_GRADIENTS:
        from slope_mm.ops import triton_pass

        return triton_pass
    from slope_mm.ops import compiled_pass

    fits = compiled_pass.fits_weight(rows, codes, mask, groups, gradient)
    return compiled_pass if fits else None


def activation_kernels(x: Tensor) -> ModuleType | None:
    """The module whose ``quantize_forward`` and ``quantize_backward`` are to be used, or None."""
    if not _enabled or is_compiling():
        return None
    if _triton_runs(x):
        from slope_mm.ops import triton_pass

        return triton_pass
    from slope_mm.ops import compiled_pass

    return compiled_pass if compiled_pass.fits_activation(x) else None
