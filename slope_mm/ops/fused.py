"""Whether fused kernels take the place of the plain passes, and which.

On CUDA they are Triton's (:mod:`slope_mm.ops.triton_pass`), and used where Triton works: the plain
passes ask for forty small kernels where these ask for one. On a CPU they are those that AOTInductor
makes (:mod:`slope_mm.ops.compiled_pass`), and used where they are asked for: their first use
compiles for tens of seconds, which a short run does not earn back. ``optim_wrapper.compile`` and
:func:`use_fused` decide otherwise.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
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
# Its language has tuples.
OLDEST_TRITON = (3, 3)

# None: each device's default.
_enabled: bool | None = None


def use_fused(enabled: bool | None) -> None:
    """Turns the fused kernels on or off for this process; None is each device's default."""
    global _enabled
    _enabled = None if enabled is None else bool(enabled)


def fused_enabled(x: Tensor) -> bool:
    """Whether fused kernels are to be used where a tensor is, if they can be had."""
    return x.is_cuda if _enabled is None else _enabled


def saves_memory(weight: Tensor) -> bool:
    """Whether a compressed weight is better made again for the backward than held.

    On a CPU it is: its pages are the kernel's to clear. A GPU's step is long in memory that
    activations take, and waits for Python.
    """
    return weight.device.type == 'cpu' and fused_enabled(weight)


@contextmanager
def fused(enabled: bool | None = True) -> Iterator[None]:
    """Scope in which the fused kernels are on, or off, or as each device has them (None)."""
    before = _enabled
    use_fused(enabled)
    try:
        yield
    finally:
        use_fused(before)


def triton_enabled(x: Tensor) -> bool:
    """Whether Triton's kernels are asked for, and to be had where a tensor is."""
    return fused_enabled(x) and not is_compiling() and _triton_runs(x)


def _triton_runs(x: Tensor) -> bool:
    """Whether Triton computes where the tensor is (its interpreter does anywhere)."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if x.is_cuda:
        return _has_triton() and _works_on(x.device)
    return os.environ.get('TRITON_INTERPRET') == '1' and _has_triton()


@functools.cache
def _works_on(device: torch.device) -> bool:
    """Whether a GPU is one that Triton compiles for, and what it needs to compile is there."""
    from slope_mm.ops import triton_pass

    try:
        triton_pass.try_out(device)
    except Exception as problem:
        warnings.warn(
            f'the Triton kernels do not run on {torch.cuda.get_device_name(device)}'
            f' ({type(problem).__name__}: {problem}); the plain passes do the work, and take'
            ' longer; optim_wrapper.compile=False says that this is meant',
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is there in a version that has what the kernels use."""
    if importlib.util.find_spec('triton') is None:
        return False
    # The distribution has other names beside nightly builds of torch.
    import triton

    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    return version >= OLDEST_TRITON


def weight_kernels(
    rows: Tensor, codes: Codes | None, mask: Tensor | None, groups: Groups | None, gradient: str
) -> ModuleType | None:
    """The module whose ``forward_pass`` and ``backward_pass`` are to be used.

    None stands for the plain ones of :mod:`slope_mm.ops.weight_pass`, which know every case.
    """
    if not fused_enabled(rows) or is_compiling():
        return None
    if _triton_runs(rows) and gradient in TRITON_GRADIENTS:
        from slope_mm.ops import triton_pass

        return triton_pass
    from slope_mm.ops import compiled_pass

    fits = compiled_pass.fits_weight(rows, codes, mask, groups, gradient)
    return compiled_pass if fits else None


def activation_kernels(x: Tensor) -> ModuleType | None:
    """The module whose ``quantize_forward`` and ``quantize_backward`` are to be used, or None."""
    if not fused_enabled(x) or is_compiling():
        return None
    if _triton_runs(x):
        from slope_mm.ops import triton_pass

        return triton_pass
    from slope_mm.ops import compiled_pass

    return compiled_pass if compiled_pass.fits_activation(x) else None
