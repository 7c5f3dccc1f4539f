"""What the GPU computes: the kernels of :mod:`slope_mm.ops.triton_pass`, in Triton's language.

Its values have no Python types; shapes and dtypes stand where the kernels are launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to a small fp32 number and taking it away again rounds to even.
_ROUND = tl.constexpr(12582912.0)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _level(x, step, low, high, offset):
    """The code of ``x``, with the set's offset."""
    code = tl.div_rn(x, step) - offset
    code = tl.maximum(tl.minimum(code, high + 1, propagate_nan=_NAN), low - 1, propagate_nan=_NAN)
    code = (code + _ROUND) - _ROUND
    code = tl.maximum(tl.minimum(code, high, propagate_nan=_NAN), low, propagate_nan=_NAN)
    return code + offset


@triton.jit
def _tile(start, length, kernel, M: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Where a tile lies in its row: lanes along it, a group's members beside each other."""
    lane = start + tl.arange(0, LANES)
    first = (lane // kernel) * (M * kernel) + lane % kernel
    member = tl.arange(0, WIDTH)[None, :]
    index = first[:, None] + member * kernel
    inside = (lane < length // M)[:, None] & (member < M)
    return first, member, index, inside


@triton.jit
def _kept(
    w, mask, x, first, member, index, inside, length, kernel,
    N: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Whether a member is among its group's N largest; lower indices win ties."""
    if MASKED:
        return tl.load(mask + index, mask=inside, other=0) != 0
    magnitude = tl.abs(x)
    rank = tl.zeros(x.shape, tl.int32)
    for j in tl.static_range(M):
        place = first + j * kernel
        rival = tl.abs(tl.load(w + place, mask=place < length, other=0.0).to(tl.float32))[:, None]
        rank += ((rival > magnitude) | ((rival == magnitude) & (j < member))).to(tl.int32)
    return rank < N


@triton.jit
def forward_kernel(
    w, step, mask, compressed, powers,
    rows, length, kernel, step_stride, low, high, offset,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    base = row.to(tl.int64) * length
    latent = tl.zeros((LANES, WIDTH), tl.float32)
    product = tl.zeros((LANES, WIDTH), tl.float32)
    level = tl.zeros((LANES, WIDTH), tl.float32)
    for start in range(0, length // M, LANES):
        first, member, index, inside = _tile(start, length, kernel, M, WIDTH, LANES)
        x = tl.load(w + base + index, mask=inside, other=0.0).to(tl.float32)
        kept = _kept(
            w + base, mask + base, x, first, member, index, inside, length, kernel, N, M, MASKED
        )
        value = x
        if QUANTIZED:
            s = tl.load(step + row * step_stride)
            value = _level(x, s, low, high, offset) * s
        # What a low-precision weight was rounded to is what counts.
        value = tl.where(kept & inside, value, 0.0).to(compressed.dtype.element_ty)
        tl.store(compressed + base + index, value, mask=inside)
        value = value.to(tl.float32)
        latent += x * x
        product += x * value
        level += value * value
    tl.store(powers + row, tl.sum(tl.sum(latent, 1), 0))
    tl.store(powers + rows + row, tl.sum(tl.sum(product, 1), 0))
    tl.store(powers + 2 * rows + row, tl.sum(tl.sum(level, 1), 0))


@triton.jit
def backward_kernel(
    grad, grad_powers, w, step, mask, grad_w, grad_step,
    rows, length, kernel, step_stride, low, high, offset, decay,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
    TASK: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    base = row.to(tl.int64) * length
    by_step = tl.zeros((LANES, WIDTH), tl.float32)
    for start in range(0, length // M, LANES):
        first, member, index, inside = _tile(start, length, kernel, M, WIDTH, LANES)
        x = tl.load(w + base + index, mask=inside, other=0.0).to(tl.float32)
        kept = _kept(
            w + base, mask + base, x, first, member, index, inside, length, kernel, N, M, MASKED
        )
        kept = kept & inside
        value = x
        total = tl.zeros((LANES, WIDTH), tl.float32)
        if TASK:
            total = tl.load(grad + base + index, mask=inside, other=0.0).to(tl.float32)
        if QUANTIZED:
            s = tl.load(step + row * step_stride)
            # The clip range belongs to q, which a pruned weight enters as zero: inside.
            scaled = tl.where(kept, tl.div_rn(x, s), 0.0)
            value = _level(x, s, low, high, offset) * s
            value = value.to(w.dtype.element_ty).to(tl.float32)
            passes = (scaled > low + offset) & (scaled < high + offset)
            passed = tl.where(passes, total, 0.0)
            by_step += tl.where(kept, total * tl.div_rn(value, s), 0.0) - passed * scaled
            total = passed
        value = tl.where(kept, value, 0.0)
        if GRADIENT == 'masked':
            total = tl.where(kept, total, 0.0)
        if GRADIENT == 'sr_ste' and TASK:
            total += tl.where(kept, 0.0, decay * x)
        if SUMS:
            by_latent = tl.load(grad_powers + row).to(tl.float32)
            by_level = tl.load(grad_powers + rows + row).to(tl.float32)
            total += value * by_level + 2 * x * by_latent
        tl.store(grad_w + base + index, total.to(grad_w.dtype.element_ty), mask=inside)
    tl.store(grad_step + row, tl.sum(tl.sum(by_step, 1), 0))


@triton.jit
def quantize_kernel(x, step, y, count, low, high, offset, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < count
    s = tl.load(step)
    value = _level(tl.load(x + index, mask=inside, other=0.0).to(tl.float32), s, low, high, offset)
    tl.store(y + index, (value * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def quantize_backward_kernel(
    grad, x, step, grad_x, partial, count, low, high, offset, TILE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < count
    s = tl.load(step)
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.div_rn(value, s)
    passes = (scaled > low + offset) & (scaled < high + offset)
    tl.store(
        grad_x + index, tl.where(passes, arriving, 0.0).to(grad_x.dtype.element_ty), mask=inside
    )
    # Where the clip range is left the gradient is zero, and zero times infinity has to be zero.
    distance = _level(value, s, low, high, offset) - tl.where(passes, scaled, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(arriving * distance, 0))
