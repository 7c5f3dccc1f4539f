"""The compiled passes against the plain ones, on random weights and activations of many shapes.

Kernels for 2:4, 2:16 and for activations are really compiled; for other groups the same code runs
uncompiled, as a compiler takes tens of seconds for each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from slope_mm.ops import (
    NMPattern,
    compiled_pass,
    compress_with_powers,
    kernel_code,
    kernel_store,
    lsq_quantize,
    mask_bits,
    mse_init_step,
    nm_mask,
    weight_codes,
    weight_pass,
)
from slope_mm.ops.fused import activation_kernels, fused, fused_enabled, weight_kernels
from slope_mm.ops.weight_pass import Groups

pytestmark = tiny.needs_kernels

SHAPES = [
    (16, 32, 3, 3),  # copied between rows of padding
    (2, 16),  # nothing but edges
    (40, 64, 1, 1),
    (300, 512),  # as it is, the first and last row apart
    (9, 48, 5, 2),
]


def both_ways(
    w: Tensor, step: Tensor, codes: Any, pattern: NMPattern | None, **options: Any
) -> list[Tensor]:
    latent, learned = w.clone().requires_grad_(), step.clone().requires_grad_()
    compressed, powers = compress_with_powers(latent, learned, codes, pattern=pattern, **options)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    ((compressed * upstream).sum() + (powers * 0.01).sum()).backward()
    assert latent.grad is not None and learned.grad is not None
    return [compressed.detach(), powers.detach(), latent.grad, learned.grad]


def assert_equal_passes(
    shape: tuple[int, ...], pattern: NMPattern | None, codes: Any, axis: int | None, **options: Any
) -> None:
    """Every other row has ties, and one is zero."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[::2] = w[::2].mul(20).round().div(20)
    w[1] = 0
    mask = None if pattern is None else nm_mask(w, pattern.n, pattern.m)
    step = mse_init_step(w, codes, axis, mask)
    with fused():
        assert fused_enabled(w)
        rows, groups = w.flatten(1), None
        if pattern is not None:
            groups = Groups(pattern.n, pattern.m, w[0, 0].numel())
        gradient = options.get('gradient', 'ste')
        assert weight_kernels(rows, codes, None, groups, gradient) is not None
        found = both_ways(w, step, codes, pattern, **options)
    assert not fused_enabled(w)
    plain = both_ways(w, step, codes, pattern, **options)
    # Values bit for bit; sums in another order.
    assert torch.equal(plain[0], found[0])
    for expected, other in zip(plain[1:], found[1:], strict=True):
        torch.testing.assert_close(other, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('gradient', ['ste', 'sr_ste', 'masked'])
def test_weights_compiled(shape: tuple[int, ...], gradient: str) -> None:
    codes = weight_codes('odd' if shape[1] == 64 else 'lsq', 2 if shape[1] == 48 else 4)
    options = dict(gradient=gradient, decay=0.1)
    assert_equal_passes(shape, NMPattern(2, 4), codes, 0, **options)
    assert_equal_passes(shape, NMPattern(1, 4), codes, None, **options)
    assert_equal_passes(shape, NMPattern(2, 16), codes, 0, **options)


def test_the_sums_alone_decay_nothing() -> None:
    """SR-STE's decay comes with the task's gradient, in the plain passes too."""
    w = torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(pattern=NMPattern(2, 4), gradient='sr_ste', decay=0.5)
    gradients = []
    for compiled in (False, True):
        latent, step = w.clone().requires_grad_(), torch.full((16, 1, 1, 1), 0.3)
        with fused(compiled):
            _, powers = compress_with_powers(latent, step, weight_codes('lsq', 4), **options)
        powers[1].sum().backward()
        gradients.append(latent.grad)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)


def uncompiled(name: str, *sizes: int) -> Any:
    """A kernel's code as it is, called as a kernel is: with the inputs it has in one list."""
    example = kernel_code.EXAMPLES[name](*sizes)

    def run(inputs: Sequence[Tensor]) -> Any:
        rest = list(inputs)
        shaped = [None if like is None else rest.pop(0) for like in example.inputs]
        assert not rest
        with torch.no_grad():
            found = example.module(*shaped)
            return [found] if isinstance(found, Tensor) else found

    return run


@pytest.mark.parametrize('m, kernel', [(4, 3), (8, 3), (16, 2), (16, 3), (16, 1)])
def test_rows_with_equal_magnitudes_at_the_limit_are_done_over(
    m: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (m, kernel) in ((8, 3), (16, 2)):
        name = ('weight_forward', m)
        monkeypatch.setitem(kernel_store._loaded, name, uncompiled(*name))
    w = torch.randn(64, 96, kernel, kernel, generator=torch.Generator().manual_seed(0))
    # The second and the third largest, so that one of them goes; the two largest, which both stay.
    x = kernel // 2
    order = w[:, :m, x, x].abs().argsort(dim=1, descending=True)
    for row, (one, other) in ((5, (1, 2)), (9, (0, 1))):
        w[row, order[row, one], x, x] = -w[row, order[row, other], x, x]
    w[17] = torch.inf
    w[30, 4, x, x] = torch.nan
    redone = []
    plain = weight_pass.forward_pass

    def watched(rows: Tensor, *args: Any, **options: Any) -> Any:
        redone.append(rows)
        return plain(rows, *args, **options)

    codes, groups = weight_codes('lsq', 4), Groups(2, m, kernel**2)
    rows, step = w.flatten(1), torch.full((64, 1), 0.2)
    expected, powers, kept = plain(rows, step, codes, None, groups, sums=True, keep_mask=True)
    with fused():
        kernels = weight_kernels(rows, codes, None, groups, 'ste')
    assert kernels is not None
    monkeypatch.setattr(weight_pass, 'forward_pass', watched)
    found, sums, mask = kernels.forward_pass(rows, step, codes, None, groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sums, powers, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.equal(mask, mask_bits.read(kept, torch.empty_like(mask)))
    # By maxima alone the two largest count as one.
    expected_again = [5, 9, 17, 30] if (m, kernel) == (16, 1) else [5, 17, 30]
    assert len(redone) == 1
    torch.testing.assert_close(redone[0], rows[expected_again], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(
    'n, m', [(2, 8), (4, 8), (1, 16), (4, 16), (1, 12), (9, 16), (1, 2), (1, 1)]
)
def test_other_groups(
    shape: tuple[int, ...], n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = NMPattern(n, m) if m > 1 else None
    own: list[Any] = [('weight_forward', m), ('thresholds', n, m), ('row_mask', n, m)]
    # Those under masks are the same for all groups.
    for name in (*own, ('given_forward', 0), ('weight_backward', 0)):
        monkeypatch.setitem(kernel_store._loaded, name, uncompiled(*name))
    # Two rows at once of the masks that are found first.
    monkeypatch.setattr(compiled_pass, 'PIECE', 2 * torch.Size(shape[1:]).numel())
    if pattern is None or shape[1] % m == 0:
        assert_equal_passes(shape, pattern, weight_codes('symmetric', 3), 0)


@pytest.mark.parametrize('shape', [(2, 3, 17, 19), (5, 7), (3, 4, 6), (64, 32, 1, 3)])
@pytest.mark.parametrize('qn, qp, offset', [(0, 15, 0.0), (-8, 7, 0.0), (-8, 7, 0.5)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
def test_activations_compiled(
    shape: tuple[int, ...], qn: int, qp: int, offset: float, layout: str
) -> None:
    x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))[1]
    if layout == 'channels_last' and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'slice':
        x = x[..., 1:]
    x.reshape(-1)[3] = torch.inf
    results = []
    for kernels in (False, True):
        values = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        step = torch.tensor([0.2], requires_grad=True)
        with fused(kernels):
            assert (activation_kernels(values) is not None) == kernels
            y = lsq_quantize(values, step, qn, qp, 0.1, offset)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), values.grad, step.grad))
    (values, grad, by_step), found = results
    assert torch.equal(found[0], values)
    assert grad is not None and found[1] is not None and torch.equal(found[1], grad)
    torch.testing.assert_close(found[2], by_step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('gradient', ['ste', 'sr_ste', 'masked'])
def test_masks_that_are_given(gradient: str) -> None:
    w = torch.randn(40, 24, 3, 3, generator=torch.Generator().manual_seed(0))
    codes, step, mask = weight_codes('lsq', 4), torch.full((40, 1, 1, 1), 0.1), w.abs() > 0.8
    with fused():
        assert weight_kernels(w.flatten(1), codes, mask.flatten(1), None, gradient) is not None
        found = both_ways(w, step, codes, None, mask=mask, gradient=gradient, decay=0.1)
    plain = both_ways(w, step, codes, None, mask=mask, gradient=gradient, decay=0.1)
    assert torch.equal(plain[0], found[0])
    for expected, other in zip(plain[1:], found[1:], strict=True):
        torch.testing.assert_close(other, expected, rtol=2e-5, atol=2e-5)


def test_what_kernels_do_not_know_is_left_to_the_plain_pass() -> None:
    codes, groups = weight_codes('lsq', 4), Groups(2, 4, 1)
    w = torch.randn(4, 8)
    with fused():
        assert weight_kernels(w, codes, None, groups, 'ste') is not None
        assert weight_kernels(w, None, None, groups, 'ste') is None
        assert weight_kernels(w, codes, None, groups, 'soft') is None
        assert weight_kernels(w.double(), codes, None, groups, 'ste') is None
        assert weight_kernels(w[:1], codes, None, groups, 'ste') is None
        assert weight_kernels(torch.randn(4, 64), codes, None, Groups(2, 32, 1), 'ste') is None
        assert activation_kernels(torch.randn(7)) is None
        assert activation_kernels(torch.randn(2, 0, 3, 3)) is None


PROGRAM = """
import warnings, torch
from slope_mm.ops import NMPattern, compress_with_powers, weight_codes
from slope_mm.ops.fused import fused
w, step = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.full((4, 1), 0.2)
def run():
    return compress_with_powers(w, step, weight_codes('lsq', 4), pattern=NMPattern(2, 4))[0]
with warnings.catch_warnings(record=True) as caught, fused():
    warnings.simplefilter('always')
    found = [run(), run()]
assert all(torch.equal(x, run()) for x in found)
print(*(str(w.message) for w in caught), sep='|')
"""


def test_without_kernels_the_plain_pass_does_the_work(tmp_path: Path) -> None:
    """One warning with the reason; the result is the same."""
    (tmp_path / 'file').write_text('')
    environment = {'SLOPE_CACHE': str(tmp_path / 'file'), 'PATH': '/usr/bin:/bin'}
    environment['PYTHONPATH'] = str(Path(kernel_store.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    warned = done.stdout.strip().split('|')
    assert len(warned) == 1
    assert 'no fused kernels here' in warned[0] and str(tmp_path / 'file') in warned[0]


def test_a_kernel_that_does_not_load_is_built_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('SLOPE_CACHE', str(tmp_path))
    monkeypatch.setattr(kernel_store, '_loaded', {})
    file = kernel_store.cache_folder() / 'activation_forward.pt2'
    file.parent.mkdir(parents=True)
    file.write_bytes(b'cut off')
    found = kernel_store.kernels(('activation_forward',))
    assert found is not None and len(found) == 1
    assert file.stat().st_size > 1000


def test_a_kernel_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    file = tmp_path / 'no_such_kernel-4.pt2'
    with pytest.raises(RuntimeError, match='no_such_kernel'):
        kernel_store._build([file])
    assert [path.name for path in tmp_path.iterdir()] == ['lock']
