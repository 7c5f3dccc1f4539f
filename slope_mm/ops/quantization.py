"""Learned-step quantization (LSQ, arXiv 1902.08153): code sets, rounding, step initialisation.

A value is ``(code + offset) * step`` with an integer code between ``qn`` and ``qp``; ``offset`` is
0 except for the ``odd`` set. Steps are positive fp32 tensors that broadcast against the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_mm.errors import RecipeError, nearest

MIN_BITS, MAX_BITS = 2, 8
# Below this a step no longer resolves fp32 weights; it also keeps x / step finite.
SMALLEST_STEP = 1e-8


@dataclass(frozen=True)
class Codes:
    """A set of levels: ``(k + offset) * step`` for integers ``qn <= k <= qp``.

    Attributes:
        bits: Bits that store one code.
        qn: Smallest integer code.
        qp: Largest integer code.
        offset: Added to the integer before it meets the step.
    """

    bits: int
    qn: int
    qp: int
    offset: float = 0.0

    @property
    def largest(self) -> float:
        """The largest level in units of the step (``Qp`` of the LSQ paper)."""
        return self.qp + self.offset


def _lsq_codes(bits: int) -> Codes:
    """{-2^(b-1), ..., 2^(b-1) - 1}."""
    return Codes(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _symmetric_codes(bits: int) -> Codes:
    """{-(2^(b-1) - 1), ..., 2^(b-1) - 1}: closed under negation."""
    return Codes(bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def _odd_codes(bits: int) -> Codes:
    """{+-1, +-3, ..., +-(2^b - 1)} * step / 2: closed under negation, without a zero."""
    return Codes(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, offset=0.5)


# The table to extend: a code set is one function of the bit width.
CODE_SETS: dict[str, Callable[[int], Codes]] = {
    'lsq': _lsq_codes,
    'symmetric': _symmetric_codes,
    'odd': _odd_codes,
}


def check_bits(bits: object, what: str) -> int:
    """Returns ``bits`` if it is an integer from 2 to 8.

    Raises:
        RecipeError: Otherwise, with ``what`` as the place.
    """
    if isinstance(bits, int) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS:
        return bits
    raise RecipeError(
        f'{what} bits={bits!r} cannot be quantized to: give an integer from {MIN_BITS} to'
        f' {MAX_BITS}, or None for full precision'
    )


def weight_codes(name: str, bits: int) -> Codes:
    """Returns the weight code set ``name`` at ``bits`` bits.

    Raises:
        RecipeError: For an unknown name or a bit width outside 2..8.
    """
    if not isinstance(name, str) or name not in CODE_SETS:
        raise RecipeError(
            f'weight codes={name!r} is unknown; choose one of {sorted(CODE_SETS)}'
            f'{nearest(str(name), CODE_SETS)}'
        )
    return CODE_SETS[name](check_bits(bits, 'weight'))


def activation_codes(bits: int, signed: bool) -> Codes:
    """Codes of an activation: 0..2^b-1 where it is never negative, LSQ's signed set elsewhere."""
    check_bits(bits, 'activation')
    return _lsq_codes(bits) if signed else Codes(bits, 0, 2**bits - 1)


def positive(step: Tensor) -> Tensor:
    """The step that is computed with: ``|step|``, at least ``SMALLEST_STEP``, in fp32.

    A large update may carry a learned step through zero; its magnitude is what quantizes.
    """
    return step.detach().float().abs().clamp_min(SMALLEST_STEP)


def scaled_gradient(gradient: Tensor, step: Tensor, scale: float) -> Tensor:
    """A learned step's gradient from that of ``positive(step)``, times LSQ's scale.

    Args:
        gradient: Of as many elements as ``step``.
        step: The learned step as it is: a negative one is folded, and with it the derivative.
        scale: LSQ's.

    Returns:
        Tensor of ``step``'s shape and dtype.
    """
    scaled = gradient.reshape(step.shape) * scale
    return (scaled * torch.where(step < 0, -1.0, 1.0)).to(step.dtype)


def _scaled(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """``x / step - offset`` in the step's precision or better: the values that are rounded."""
    if step.dim() == 0:
        # Type promotion does not count a number without dimensions.
        x = x.to(torch.promote_types(x.dtype, step.dtype))
    scaled = x / step
    return scaled.sub_(codes.offset) if codes.offset else scaled


def to_codes(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """Integer codes of ``x`` as a float tensor: ``clip(round(x / step - offset), qn, qp)``.

    Args:
        x: Values of any shape.
        step: Positive steps, broadcastable to ``x``.
        codes: The code set.
    """
    return _scaled(x, step, codes).round_().clamp_(codes.qn, codes.qp)


def from_codes(integer: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """Values of integer codes, in place: ``(code + offset) * step``."""
    if codes.offset:
        integer.add_(codes.offset)
    return integer.mul_(step)


def step_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Shape of the steps of a weight: one per index of ``axis``, or a single one for None.

    At least one dimension, so that a step can be a parameter everywhere.
    """
    if axis is None:
        return (1,) * len(shape)
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


def lsq_init_step(
    w: Tensor, codes: Codes, axis: int | None = 0, mask: Tensor | None = None
) -> Tensor:
    """LSQ's first step: ``2 * mean|w| / sqrt(Qp)`` over the kept weights.

    Args:
        w: Weight.
        codes: The code set.
        axis: The output-channel axis for one step a channel; None for one step a tensor.
        mask: Bool, True where kept; None for all.

    Returns:
        fp32 steps of shape :func:`step_shape`, positive also where all weights are zero.
    """
    shape = step_shape(tuple(w.shape), axis)
    magnitude = w.detach().float().abs()
    if mask is None:
        count = torch.full(shape, w.numel() / math.prod(shape), device=w.device)
    else:
        magnitude = magnitude * mask
        count = mask.float().sum_to_size(shape)
    mean = magnitude.sum_to_size(shape) / count.clamp_min(1)
    return (2 * mean / math.sqrt(codes.largest)).clamp_min(SMALLEST_STEP)


def _search_rows(rows: Tensor, kept: Tensor | None, codes: Codes, start: Tensor) -> Tensor:
    """Per row, the step of least squared error: ``start``, or a share of the maximum as clip range.

    The error has several local minima (at 8 bits the LSQ start lies 13 dB below the best one), so
    a search comes before the descent. 1,024 values a row are enough to rank the candidates for
    weights. A single row, such as the sampled inputs of a layer, may hold a few values that matter
    more than all others: 16,384 of it are looked at.
    """
    largest = rows.abs().amax(1, keepdim=True)
    stride = max(1, rows.shape[1] // max(1024, 16384 // rows.shape[0]))
    while math.gcd(stride, rows.shape[1]) > 1:
        # Else the sample could hold a single position of the kernel, or of the N:M groups.
        stride -= 1
    sample = rows[:, ::stride]
    weight = None if kept is None else kept[:, ::stride]
    best = torch.full_like(largest, float('inf'))
    step = (largest / codes.largest).clamp_min(SMALLEST_STEP)
    shares = torch.linspace(0.1, 1.1, 21).tolist()
    for candidate in (start, *(largest * (share / codes.largest) for share in shares)):
        candidate = candidate.clamp_min(SMALLEST_STEP)
        error = from_codes(to_codes(sample, candidate, codes), candidate, codes).sub_(sample)
        error.mul_(error)
        if weight is not None:
            error.mul_(weight)
        total = error.sum(1, keepdim=True)
        step = torch.where(total < best, candidate, step)
        best = torch.minimum(best, total)
    return step


def mse_init_step(
    w: Tensor,
    codes: Codes,
    axis: int | None = 0,
    mask: Tensor | None = None,
    iterations: int = 1,
) -> Tensor:
    """The step of least squared error over the kept weights.

    A search over clip ranges and LSQ's first step, then alternations of rounding with the
    closed-form best step ``<w, level> / <level, level>``, which never increase the error.

    Args:
        w: Weight.
        codes: The code set.
        axis: As in :func:`lsq_init_step`.
        mask: As in :func:`lsq_init_step`.
        iterations: Alternations; each is about three passes over ``w``.

    Returns:
        fp32 steps of shape :func:`step_shape`, positive also where all weights are zero.
    """
    w = w.detach().float()
    if w.numel() == 0:
        return torch.full(step_shape(tuple(w.shape), axis), SMALLEST_STEP, device=w.device)
    shape = step_shape(tuple(w.shape), axis)
    if mask is not None:
        w = w * mask
    rows, kept = _as_rows(w, axis), None if mask is None else _as_rows(mask, axis)
    start = lsq_init_step(w, codes, axis, mask).reshape(-1, 1)
    step = _search_rows(rows, kept, codes, start).reshape(shape)
    return _alternated(w, codes, mask, step, iterations)


def least_squares_init_step(
    w: Tensor,
    codes: Codes,
    axis: int | None = 0,
    mask: Tensor | None = None,
    iterations: int = 20,
) -> Tensor:
    """LSQ's first step, improved by the alternations of :func:`mse_init_step` without its search.

    They end in the local minimum that is nearest to LSQ's step.

    Args:
        w: Weight.
        codes: The code set.
        axis: As in :func:`lsq_init_step`.
        mask: As in :func:`lsq_init_step`.
        iterations: Alternations.

    Returns:
        fp32 steps of shape :func:`step_shape`, positive also where all weights are zero.
    """
    w = w.detach().float()
    if mask is not None:
        w = w * mask
    return _alternated(w, codes, mask, lsq_init_step(w, codes, axis, mask), iterations)


def _alternated(
    w: Tensor, codes: Codes, mask: Tensor | None, step: Tensor, iterations: int
) -> Tensor:
    """Rounding and the closed-form best step for the codes by turns."""
    shape = step.shape
    for _ in range(iterations):
        level = to_codes(w, step, codes)
        if codes.offset:
            level.add_(codes.offset)
        if mask is not None:
            level.mul_(mask)
        power = (level * level).sum_to_size(shape)
        best = level.mul_(w).sum_to_size(shape) / power.clamp_min(SMALLEST_STEP)
        # A channel whose weights all round to zero keeps its step.
        step = torch.where((power > 0) & (best > SMALLEST_STEP), best, step)
    return step


# Rules for the first step, by name.
STEP_INITS = {
    'search': mse_init_step,
    'lsq': lsq_init_step,
    'least_squares': least_squares_init_step,
}


def _as_rows(x: Tensor, axis: int | None) -> Tensor:
    """One row per step."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def grad_scale(count: float, codes: Codes) -> float:
    """LSQ's scale of the step gradient, ``1 / sqrt(count * Qp)``.

    Args:
        count: Number of values that share one step.
        codes: The code set.
    """
    return 1.0 / math.sqrt(max(count, 1.0) * codes.largest)
