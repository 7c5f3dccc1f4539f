"""What the GPU computes: the kernels of :mod:`slope_mm.ops.triton_pass`, in Triton's language.

Its values have no Python types; shapes and dtypes stand where the kernels are launched.

A lane is an N:M group. Lanes that lie beside each other in memory are computed beside each other;
where members do (1x1 kernels and matrices), a tile is loaded whole and split into members. Groups
of up to four are ranked by comparing all pairs, in registers. Of larger ones the N-th largest is
found first; members of 3x3 kernels are then read once more, from the cache, as sixteen values a
lane and what becomes of them leave a multiprocessor with too few registers to hide its memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to a small fp32 number and taking it away again rounds to even.
_ROUND = tl.constexpr(12582912.0)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _level(scaled, low, high, offset):
    """The code of ``scaled = x / step``, with the set's offset."""
    code = scaled - offset
    code = tl.maximum(tl.minimum(code, high + 1, propagate_nan=_NAN), low - 1, propagate_nan=_NAN)
    code = (code + _ROUND) - _ROUND
    code = tl.maximum(tl.minimum(code, high, propagate_nan=_NAN), low, propagate_nan=_NAN)
    return code + offset


@triton.jit
def _positive(step, smallest):
    """:func:`slope_mm.ops.positive`."""
    return tl.maximum(tl.abs(step.to(tl.float32)), smallest, propagate_nan=_NAN)


@triton.jit
def _split(x, M: tl.constexpr, LANES: tl.constexpr):
    """Members of a tile ``[LANES, M]`` as M vectors; M is a power of two."""
    if M == 1:
        members = (tl.reshape(x, [LANES]),)
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, M // 2, 2]))
        evens = _split(even, M // 2, LANES)
        odds = _split(odd, M // 2, LANES)
        members = (evens[0], odds[0])  # type: ignore[assignment]
        for i in tl.static_range(1, M // 2):
            members = members + (evens[i], odds[i])  # type: ignore[assignment]
    return members


@triton.jit
def _join(members, START: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr):
    """The inverse of :func:`_split` for the M members ``START, START + STEP, ...``."""
    if M == 1:
        tile = tl.reshape(members[START], [LANES, 1])
    else:
        even = _join(members, START, 2 * STEP, M // 2, LANES)
        odd = _join(members, START + STEP, 2 * STEP, M // 2, LANES)
        tile = tl.reshape(tl.join(even, odd), [LANES, M])
    return tile


@triton.jit
def _load(
    pointer, lane, inside, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The members of groups as fp32 vectors; zero behind the row's end."""
    if WHOLE:
        index = lane[:, None] * M + tl.arange(0, M)[None, :]
        tile = tl.load(pointer + index, mask=inside[:, None], other=0.0).to(tl.float32)
        members = _split(tile, M, LANES)
    else:
        first = (lane // KERNEL) * (M * KERNEL) + lane % KERNEL
        members = (tl.load(pointer + first, mask=inside, other=0.0).to(tl.float32),)
        for i in tl.static_range(1, M):
            place = pointer + first + i * KERNEL
            members = members + (tl.load(place, mask=inside, other=0.0).to(tl.float32),)
    return members


@triton.jit
def _store(
    pointer, members, lane, inside, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the members of groups to where :func:`_load` reads them."""
    if WHOLE:
        index = lane[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(pointer + index, _join(members, 0, 1, M, LANES), mask=inside[:, None])
    else:
        first = (lane // KERNEL) * (M * KERNEL) + lane % KERNEL
        for i in tl.static_range(M):
            tl.store(pointer + first + i * KERNEL, members[i], mask=inside)


@triton.jit
def _outranked(members, WHICH: tl.constexpr, M: tl.constexpr):
    """How many members of its group come before member WHICH; lower indices win ties."""
    magnitude = tl.abs(members[WHICH])
    rank = tl.zeros(magnitude.shape, tl.int32)
    for j in tl.static_range(M):
        if j < WHICH:
            rank += (tl.abs(members[j]) >= magnitude).to(tl.int32)
        if j > WHICH:
            rank += (tl.abs(members[j]) > magnitude).to(tl.int32)
    return rank


@triton.jit
def _member(
    xs, pointer, lane, inside, WHICH: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Member WHICH: from registers, or once more from memory (that is: from the cache)."""
    if AGAIN:
        first = (lane // KERNEL) * (M * KERNEL) + lane % KERNEL
        x = tl.load(pointer + first + WHICH * KERNEL, mask=inside, other=0.0).to(tl.float32)
    else:
        x = xs[WHICH]
    return x


@triton.jit
def _least_kept(
    xs, pointer, lane, inside, N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr,
    LANES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The N-th largest magnitude of each group, and how many are as large and kept."""
    top = (tl.full((LANES,), -1.0, tl.float32),)
    for _ in tl.static_range(1, N):
        top = top + (tl.full((LANES,), -1.0, tl.float32),)  # type: ignore[assignment]
    for i in tl.static_range(M):
        x = tl.abs(_member(xs, pointer, lane, inside, i, M, KERNEL, AGAIN))
        following = (tl.maximum(top[0], x),)
        x = tl.minimum(top[0], x)
        for k in tl.static_range(1, N):
            following = following + (tl.maximum(top[k], x),)  # type: ignore[assignment]
            x = tl.minimum(top[k], x)
        top = following
    room = tl.full((LANES,), N, tl.int32)
    for k in tl.static_range(N):
        room -= (top[k] > top[N - 1]).to(tl.int32)
    return top[N - 1], room


@triton.jit
def _forward_row(
    w, step, mask, compressed, powers, rows, row, length, low, high, offset, smallest,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One row; ``w``, ``mask`` and ``compressed`` point to its start, ``step`` to its step."""
    latent = tl.zeros((LANES,), tl.float32)
    product = tl.zeros((LANES,), tl.float32)
    level = tl.zeros((LANES,), tl.float32)
    s = 1.0
    if QUANTIZED:
        s = _positive(tl.load(step), smallest)
    AGAIN: tl.constexpr = M > 4 and not WHOLE
    for start in range(0, length // M, LANES):
        lane = start + tl.arange(0, LANES)
        inside = lane < length // M
        xs = ()
        if not AGAIN:
            xs = _load(w, lane, inside, M, KERNEL, LANES, WHOLE)
        least = 0.0
        room = 0
        if M > 4:
            least, room = _least_kept(xs, w, lane, inside, N, M, KERNEL, LANES, AGAIN)
        values = ()
        for i in tl.static_range(M):
            x = _member(xs, w, lane, inside, i, M, KERNEL, AGAIN)
            value = x
            if QUANTIZED:
                value = _level(tl.div_rn(x, s), low, high, offset) * s
            if MASKED:
                kept = tl.load(mask + lane, mask=inside, other=0) != 0
            elif M > 4:
                equal = tl.abs(x) == least
                kept = (tl.abs(x) > least) | (equal & (room > 0))
                room -= equal.to(tl.int32)
            else:
                kept = _outranked(xs, i, M) < N
            # What a low-precision weight was rounded to is what counts.
            rounded = tl.where(kept & inside, value, 0.0).to(compressed.dtype.element_ty)
            value = rounded.to(tl.float32)
            latent += x * x
            product += x * value
            level += value * value
            if AGAIN:
                first = (lane // KERNEL) * (M * KERNEL) + lane % KERNEL
                tl.store(compressed + first + i * KERNEL, rounded, mask=inside)
            else:
                values = values + (rounded,)  # type: ignore[assignment]
        if not AGAIN:
            _store(compressed, values, lane, inside, M, KERNEL, LANES, WHOLE)
    tl.store(powers + row, tl.sum(latent, 0))
    tl.store(powers + rows + row, tl.sum(product, 0))
    tl.store(powers + 2 * rows + row, tl.sum(level, 0))


@triton.jit
def forward_kernel(
    w, step, mask, compressed, powers,
    rows, length, step_stride, low, high, offset, smallest,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One weight: a program a row."""
    row = tl.program_id(0)
    base = row.to(tl.int64) * length
    _forward_row(
        w + base, step + row * step_stride, mask + base, compressed + base, powers,
        rows, row, length, low, high, offset, smallest,
        N, M, KERNEL, LANES, WHOLE, QUANTIZED, MASKED,
    )  # fmt: skip


@triton.jit
def _find_row(table, owner, ALIGNED: tl.constexpr):
    """Where a program's row is, as ``slope_mm.ops.compress_many`` wrote it down.

    Returns:
        Pointers to the row of W, its step and its mask; where it starts in what all weights of the
        table are laid end to end in; and its length.
    """
    layer = table + 6 * tl.load(owner + tl.program_id(0)).to(tl.int64)
    row = tl.program_id(0) - tl.load(layer + 3)
    length = tl.load(layer + 4)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    base = row * length
    w = tl.load(layer).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        w = tl.multiple_of(w, 16)
    step = tl.load(layer + 1).to(tl.pointer_type(tl.float32)) + row
    mask = tl.load(layer + 2).to(tl.pointer_type(tl.uint8)) + base
    start = tl.load(layer + 5)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return w + base, step, mask, start + base, length.to(tl.int32)


@triton.jit
def forward_many_kernel(
    table, owner, compressed, powers, rows, low, high, offset, smallest,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The quantized weights of a table: a program a row."""
    w, step, mask, start, length = _find_row(table, owner, ALIGNED)
    _forward_row(
        w, step, mask, compressed + start, powers, rows, tl.program_id(0), length,
        low, high, offset, smallest, N, M, KERNEL, LANES, WHOLE, True, MASKED,
    )  # fmt: skip


@triton.jit
def _backward_row(
    grad, grad_powers, w, step, powers, mask, grad_w, grad_step,
    rows, row, length, powers_stride, low, high, offset, smallest, decay, grad_scale,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
    TASK: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One row, with pointers as in :func:`_forward_row`."""
    by_step = tl.zeros((LANES,), tl.float32)
    s = 1.0
    sign = 1.0
    if QUANTIZED:
        learned = tl.load(step).to(tl.float32)
        s = _positive(learned, smallest)
        # A negative step is folded, and with it the derivative.
        sign = tl.where(learned < 0, -1.0, 1.0)
    by_latent = 0.0
    by_product = 0.0
    if SUMS:
        by_latent = 2 * tl.load(grad_powers + row).to(tl.float32)
        by_product = tl.load(grad_powers + powers_stride + row).to(tl.float32)
    AGAIN: tl.constexpr = M > 4 and not WHOLE
    for start in range(0, length // M, LANES):
        lane = start + tl.arange(0, LANES)
        inside = lane < length // M
        xs = ()
        gs = ()
        if not AGAIN:
            xs = _load(w, lane, inside, M, KERNEL, LANES, WHOLE)
            if TASK:
                gs = _load(grad, lane, inside, M, KERNEL, LANES, WHOLE)
        least = 0.0
        room = 0
        if M > 4:
            least, room = _least_kept(xs, w, lane, inside, N, M, KERNEL, LANES, AGAIN)
        totals = ()
        for i in tl.static_range(M):
            x = _member(xs, w, lane, inside, i, M, KERNEL, AGAIN)
            if MASKED:
                kept = tl.load(mask + lane, mask=inside, other=0) != 0
            elif M > 4:
                equal = tl.abs(x) == least
                kept = (tl.abs(x) > least) | (equal & (room > 0))
                room -= equal.to(tl.int32)
            else:
                kept = _outranked(xs, i, M) < N
            total = tl.zeros((LANES,), tl.float32)
            if TASK:
                total = _member(gs, grad, lane, inside, i, M, KERNEL, AGAIN)
            value = x
            if QUANTIZED:
                # The clip range belongs to q, which a pruned weight enters as zero: inside.
                scaled = tl.where(kept, tl.div_rn(x, s), 0.0)
                code = _level(scaled, low, high, offset)
                value = (code * s).to(grad_w.dtype.element_ty).to(tl.float32)
                passes = (scaled > low + offset) & (scaled < high + offset)
                passed = tl.where(passes, total, 0.0)
                by_step += tl.where(kept, total * code, 0.0) - passed * scaled
                total = passed
            value = tl.where(kept, value, 0.0)
            if GRADIENT == 'masked':
                total = tl.where(kept, total, 0.0)
            if GRADIENT == 'sr_ste' and TASK:
                total += tl.where(kept, 0.0, decay * x)
            if SUMS:
                total += value * by_product + x * by_latent
            total = total.to(grad_w.dtype.element_ty)
            if AGAIN:
                first = (lane // KERNEL) * (M * KERNEL) + lane % KERNEL
                tl.store(grad_w + first + i * KERNEL, total, mask=inside)
            else:
                totals = totals + (total,)  # type: ignore[assignment]
        if not AGAIN:
            _store(grad_w, totals, lane, inside, M, KERNEL, LANES, WHOLE)
    if QUANTIZED:
        result = tl.sum(by_step, 0)
        if SUMS:
            # (code + offset) * step with the codes held fixed: the derivative of a product by the
            # step is the product by the step.
            by_level = tl.load(grad_powers + 2 * powers_stride + row).to(tl.float32)
            exact = by_product * tl.load(powers + rows + row)
            exact += 2 * by_level * tl.load(powers + 2 * rows + row)
            result += exact / s
        tl.store(grad_step + row, result * grad_scale * sign)


@triton.jit
def backward_kernel(
    grad, grad_powers, w, step, powers, mask, grad_w, grad_step,
    rows, length, step_stride, powers_stride, low, high, offset, smallest, decay, grad_scale,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
    TASK: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One weight: a program a row."""
    row = tl.program_id(0)
    base = row.to(tl.int64) * length
    _backward_row(
        grad + base, grad_powers, w + base, step + row * step_stride, powers, mask + base,
        grad_w + base, grad_step, rows, row, length, powers_stride,
        low, high, offset, smallest, decay, grad_scale,
        N, M, KERNEL, LANES, WHOLE, QUANTIZED, MASKED, TASK, SUMS, GRADIENT,
    )  # fmt: skip


@triton.jit
def backward_many_kernel(
    table, owner, scales, grad, grad_powers, powers, grad_w, grad_step,
    rows, powers_stride, low, high, offset, smallest,
    N: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    SUMS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The quantized weights of a table, their gradients laid end to end: a program a row."""
    w, step, mask, start, length = _find_row(table, owner, ALIGNED)
    _backward_row(
        grad + start, grad_powers, w, step, powers, mask, grad_w + start, grad_step,
        rows, tl.program_id(0), length, powers_stride,
        low, high, offset, smallest, 0.0, tl.load(scales + tl.program_id(0)),
        N, M, KERNEL, LANES, WHOLE, True, MASKED, True, SUMS, GRADIENT,
    )  # fmt: skip


@triton.jit
def quantize_kernel(x, step, y, count, low, high, offset, smallest, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < count
    s = _positive(tl.load(step), smallest)
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    value = _level(tl.div_rn(value, s), low, high, offset) * s
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def quantize_backward_kernel(
    grad, x, step, grad_x, partial, count, low, high, offset, smallest,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    s = _positive(tl.load(step), smallest)
    by_step = tl.zeros((TILE,), tl.float32)
    for i in range(TILES):
        index = (tl.program_id(0).to(tl.int64) * TILES + i) * TILE + tl.arange(0, TILE)
        inside = index < count
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        arriving = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.div_rn(value, s)
        passes = (scaled > low + offset) & (scaled < high + offset)
        passed = tl.where(passes, arriving, 0.0)
        tl.store(grad_x + index, passed.to(grad_x.dtype.element_ty), mask=inside)
        # Outside the clip range the gradient is zero, and zero times infinity has to be zero.
        distance = _level(scaled, low, high, offset) - tl.where(passes, scaled, 0.0)
        by_step += arriving * distance
    tl.store(partial + tl.program_id(0), tl.sum(by_step, 0))


@triton.jit
def step_gradient_kernel(partial, step, grad_step, count, grad_scale, TILE: tl.constexpr):
    """The sum of what programs of :func:`quantize_backward_kernel` found, by one program."""
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        total += tl.load(partial + index, mask=index < count, other=0.0).to(tl.float64)
    sign = tl.where(tl.load(step) < 0, -1.0, 1.0)
    result = (tl.sum(total, 0) * grad_scale).to(tl.float32) * sign
    tl.store(grad_step, result.to(grad_step.dtype.element_ty))
