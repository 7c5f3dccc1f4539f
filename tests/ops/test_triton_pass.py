"""The Triton kernels: what they compute, through Triton's interpreter, and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_mm.ops import fused

CASES = Path(__file__).with_name('triton_cases.py')
NEEDED = "needs Triton 3.3, which is made for Linux's x86-64 and a torch that takes it"


def test_the_kernels_in_a_process_that_interprets_them() -> None:
    """A process of its own: Triton decides when it is imported."""
    pytest.importorskip('triton', '3.3', reason=NEEDED)
    environment = dict(os.environ, TRITON_INTERPRET='1')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'skipped' not in done.stdout, done.stdout


def test_one_warning_where_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for a CPU, which Triton has no compiler for."""
    pytest.importorskip('triton', '3.3', reason=NEEDED)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: 'an old card')
    fused._works_on.cache_clear()
    try:
        with pytest.warns(UserWarning, match='do not run on an old card .*compile=False'):
            assert not fused._works_on(torch.device('cpu'))
        # Asked once: the answer, and the warning, are those of the first time.
        assert not fused._works_on(torch.device('cpu'))
    finally:
        fused._works_on.cache_clear()


def test_the_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, which needs no GPU: the interpreter accepts what the compiler refuses."""
    triton = pytest.importorskip('triton', '3.3', reason=NEEDED)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from slope_mm.ops import triton_kernels, triton_pass

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    integers = {'rows', 'length', 'step_stride', 'powers_stride', 'count'}
    numbers = {'low', 'high', 'offset', 'smallest', 'decay', 'grad_scale'}
    groups = dict(N=2, M=4, LANES=512, QUANTIZED=True, MASKED=False)
    backward = dict(TASK=True, SUMS=True, GRADIENT='sr_ste')
    # 3x3 and 1x1 kernels, and a frozen mask.
    layers = [dict(groups, KERNEL=9, WHOLE=False), dict(groups, KERNEL=1, WHOLE=True)]
    layers.append(dict(groups, N=1, M=1, KERNEL=1, WHOLE=False, MASKED=True))
    kernels: list[tuple[Any, dict[str, Any]]] = []
    for layer in layers:
        kernels.append((triton_kernels.forward_kernel, layer))
        kernels.append((triton_kernels.backward_kernel, {**layer, **backward}))
        many = {k: v for k, v in layer.items() if k != 'QUANTIZED'} | dict(ALIGNED=True)
        kernels.append((triton_kernels.forward_many_kernel, many))
        many = many | dict(SUMS=True, GRADIENT='ste')
        kernels.append((triton_kernels.backward_many_kernel, many))
    kernels.append((triton_kernels.quantize_kernel, dict(TILE=1024)))
    kernels.append((triton_kernels.quantize_backward_kernel, dict(TILE=1024, TILES=4)))
    kernels.append((triton_kernels.step_gradient_kernel, dict(TILE=1024)))
    for kernel, constants in kernels:
        known = dict(mask='*u8', table='*i64', owner='*i32')
        types = {name: known.get(name, '*fp32') for name in kernel.arg_names}
        types.update(dict.fromkeys(integers & types.keys(), 'i32'))
        types.update(dict.fromkeys(numbers & types.keys(), 'fp32'))
        types.update(dict.fromkeys(constants, 'constexpr'))
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(kernel, types, places),
            target=GPUTarget('cuda', 80, 32),
            options=triton_pass.OPTIONS,
        )
        assert made.asm['cubin'], kernel
