"""The passes of weights and activations as one loop each, for a compiler to make kernels of.

Which members of a group are kept is found without laying the groups out: a member's rank is counted
by comparing it with the others of its group, which lie a multiple of ``kernel`` positions away
along the row, so that every load is contiguous whatever the kernel size, and one compiled loop
serves all layers of a group size. Those at the first and the last row's ends lie outside of what is
worked on, so a weight is handed over with a row of anything on either side, or as one whose first
and last row are not worked on.

Large groups have many others. Where vectors are long enough, the N-th largest of a group is found
instead, once for all its members (:class:`Thresholds`, :class:`RowMask`).

Equal magnitudes are not told apart, which would cost as much again. Each pass counts what it kept a
row: where that is not N of each group, equal ones stood at the limit, and the row has to be done
over by a pass that knows which of them stays.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope_mm.ops.quantization import SMALLEST_STEP
from slope_mm.ops.selection import kth_largest

# Finite in fp32: times a gradient of zero it stays zero.
LARGEST = 3e38
# A kept weight's 1 and a pruned one's 0 lie in memory as this: a kernel that loads bytes for them
# takes more than twice as long.
MASK = torch.bfloat16
# Scalars of a kernel, in this order: an fp32 vector, so that other values need no other kernel.
SCALARS = ('low', 'high', 'offset', 'kept', 'pruned_share', 'decay', 'grad_scale')


def _around(rows: Tensor, marker: Tensor, m: int) -> tuple[Tensor, list[Tensor]]:
    """The rows to work on, and for each distance from 1 to M - 1 their groups' other members.

    Args:
        rows: The rows to work on and one on either side.
        marker: As long as a kernel is large, and two more: a size that may be 1 would be a constant
            to the compiler, and a number would have to be a tensor's value.
        m: The group size.

    Returns:
        ``(w, others)``: ``[rows, length]``, and two for each distance: the weights that many
        members on, and those of the same cyclic distance before. What belongs to another group is
        not looked at.
    """
    kernel, (count, length) = marker.shape[0] - 2, rows.shape

    def moved(positions: int) -> Tensor:
        # All of one tensor: slices of it would ask for proofs that they lie in it.
        return rows.as_strided((count - 2, length), (length, 1), length + positions)

    others = []
    for distance in range(1, m):
        others += [moved(distance * kernel), moved((distance - m) * kernel)]
    return moved(0), others


def _kept(w: Tensor, others: Sequence[Tensor], member: Tensor, count: Tensor) -> Tensor:
    """Which weights are among their group's ``count`` largest, all that are equal at the limit.

    Args:
        w: ``[rows, length]``.
        others: Of :func:`_around`.
        member: ``[length]``, each position's index in its group.
        count: How many are kept.
    """
    size, magnitude = len(others) // 2 + 1, w.abs()
    rank = torch.zeros_like(w)
    for distance in range(1, size):
        wraps = member >= size - distance
        other = torch.where(wraps, others[2 * distance - 1], others[2 * distance - 2]).abs()
        rank = rank + (other > magnitude).to(torch.float32)
    return rank < count


def _positive(step: Tensor) -> Tensor:
    """:func:`~slope_mm.ops.quantization.positive`."""
    return step.abs().clamp_min(SMALLEST_STEP)


def _level(scaled: Tensor, scalars: Tensor) -> Tensor:
    """``x / step`` to levels in units of the step."""
    return torch.clamp(torch.round(scaled - scalars[2]), scalars[0], scalars[1]) + scalars[2]


def _sums(w: Tensor, level: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """``w·w``, ``w·ŵ``, ``ŵ·ŵ`` of each row, and the sums of what else there is."""
    return tuple(x.sum(1) for x in (w * w, w * level, level * level, *more))


class WeightForward(nn.Module):
    """Compressed rows and their masks; of each row ``w·w``, ``w·ŵ``, ``ŵ·ŵ`` and what was kept."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.m = m

    def forward(
        self,
        rows: Tensor,
        marker: Tensor,
        member: Tensor,
        step: Tensor,
        scalars: Tensor,
        compressed: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        w, others = _around(rows, marker, self.m)
        # As a number: a boolean that is used twice would be stored, and read a byte at a time.
        kept = _kept(w, others, member, scalars[3]).to(torch.float32)
        step = _positive(step)
        level = _level(w / step, scalars) * step * kept
        compressed.copy_(level)
        mask.copy_(kept)
        return _sums(w, level, kept)


class Thresholds(nn.Module):
    """The N-th largest magnitude of groups ``[groups, M, kernel]``, for every position of it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, groups: Tensor) -> Tensor:
        return kth_largest(tuple(member.abs() for member in groups.unbind(1)), self.n)


class ThresholdMask(nn.Module):
    """The mask of groups from their thresholds, in fp32: 1 for all that are equal to one."""

    def forward(self, groups: Tensor, thresholds: Tensor) -> Tensor:
        return (groups.abs() >= thresholds.unsqueeze(1)).to(torch.float32)


class RowMask(nn.Module):
    """The mask of groups ``[groups, M]`` whose members lie side by side, by N maxima, in fp32.

    One takes all that is equal to it: with ties at the limit or above more than N are kept.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, groups: Tensor) -> Tensor:
        magnitudes = groups.abs()
        limit = magnitudes.amax(1, keepdim=True)
        for _ in range(self.n - 1):
            below = torch.where(magnitudes < limit, magnitudes, -1.0)
            limit = below.amax(1, keepdim=True)
        return (magnitudes >= limit).to(torch.float32)


class GivenForward(nn.Module):
    """:class:`WeightForward` under a mask that is there, or none, where nothing is counted."""

    def forward(
        self, w: Tensor, mask: Tensor | None, step: Tensor, scalars: Tensor
    ) -> tuple[Tensor, ...]:
        step = _positive(step)
        level = _level(w / step, scalars) * step
        if mask is None:
            return level, *_sums(w, level)
        kept = mask.to(torch.float32)
        level = level * kept
        return level, *_sums(w, level, kept)


class WeightBackward(nn.Module):
    """The gradient of rows, and of each row the learned step's."""

    def forward(
        self,
        grad: Tensor,
        w: Tensor,
        mask: Tensor | None,
        step: Tensor,
        powers: Tensor,
        grad_powers: Tensor,
        scalars: Tensor,
    ) -> tuple[Tensor, ...]:
        s = _positive(step)
        scaled = w / s
        level = _level(scaled, scalars)
        low, high = scalars[0] + scalars[2], scalars[1] + scalars[2]
        passed = torch.where((scaled > low) & (scaled < high), grad, 0.0)
        by_step = grad * level - passed * scaled
        if mask is not None:
            kept = mask.to(torch.float32) > 0
            level = torch.where(kept, level, 0.0)
            by_step = torch.where(kept, by_step, 0.0)
            passed = torch.where(kept, passed, grad * scalars[4] + w * scalars[5])
        by_latent, by_level = 2 * grad_powers[0].unsqueeze(1), grad_powers[1].unsqueeze(1)
        # As slope_mm.ops.weight_pass.step_gradient has it.
        exact = (grad_powers[1] * powers[1] + 2 * grad_powers[2] * powers[2]).unsqueeze(1)
        grad_step = by_step.sum(1, keepdim=True) + exact / s
        grad_step = grad_step * scalars[6] * torch.where(step < 0, -1.0, 1.0)
        return passed + (w * by_latent + level * s * by_level), grad_step


class ActivationForward(nn.Module):
    """Quantized values."""

    def forward(self, x: Tensor, step: Tensor, scalars: Tensor, quantized: Tensor) -> tuple[()]:
        quantized.copy_(_level(x / step, scalars) * step)
        return ()


class ActivationBackward(nn.Module):
    """The gradient of values, and the step's: one value a row.

    The step is handed over once a row as well: a loop that knows rows is fused with the sums'.
    """

    def forward(
        self,
        grad: Tensor,
        x: Tensor,
        step: Tensor,
        scalars: Tensor,
        grad_x: Tensor,
        grad_step: Tensor,
    ) -> tuple[()]:
        scaled = x / step
        low, high = scalars[0] + scalars[2], scalars[1] + scalars[2]
        passed = torch.where((scaled > low) & (scaled < high), grad, 0.0)
        grad_x.copy_(passed)
        # Outside the clip range the gradient is zero, and zero times infinity has to be zero.
        by_step = grad * _level(scaled, scalars) - passed * scaled.clamp(-LARGEST, LARGEST)
        grad_step.copy_(by_step.sum(1))
        return ()


class Example(NamedTuple):
    """What a kernel is exported with.

    Attributes:
        module: The kernel's code.
        inputs: Example inputs.
        dynamic: Which of their sizes vary, in ``torch.export``'s form.
        options: For the compiler.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    options: dict[str, Any] = {}


# Of weights, as kernels are exported with: 6 rows of 8 groups.
_ROWS = 6


def weight_forward(m: int) -> Example:
    """The forward pass for groups of ``m``."""
    rows, length = torch.export.Dim('rows', min=2), torch.export.Dim('length', min=2)
    marker = torch.export.Dim('marker', min=3)
    both = {0: rows, 1: length}
    inputs = (
        torch.randn(_ROWS + 2, 8 * m),
        torch.zeros(5),
        torch.zeros(8 * m),
        torch.ones(_ROWS, 1),
        torch.ones(len(SCALARS)),
        torch.randn(_ROWS, 8 * m),
        torch.zeros(_ROWS, 8 * m, dtype=MASK),
    )
    dynamic = ({0: rows + 2, 1: length}, {0: marker}, {0: length}, {0: rows}, None, both, both)
    return Example(WeightForward(m), inputs, dynamic)


# Nine positions as eight and one. Vectors of sixteen would be loaded and stored in part, which took
# two to four times as long, and a vector of eight has no bf16.
_SHORT = {'cpp.simdlen': 256} if platform.machine() in ('x86_64', 'AMD64') else {}


def thresholds(n: int, m: int) -> Example:
    """The limits of groups whose members lie a kernel apart."""
    groups, kernel = torch.export.Dim('groups', min=2), torch.export.Dim('kernel', min=2)
    inputs = (torch.randn(48, m, 9),)
    return Example(Thresholds(n), inputs, ({0: groups, 2: kernel},), _SHORT)


def threshold_mask() -> Example:
    """The mask for any limits."""
    groups, kernel = torch.export.Dim('groups', min=2), torch.export.Dim('kernel', min=2)
    inputs = (torch.randn(48, 16, 9), torch.randn(48, 9))
    dynamic = ({0: groups, 1: torch.export.Dim('m', min=2), 2: kernel}, {0: groups, 1: kernel})
    return Example(ThresholdMask(), inputs, dynamic, _SHORT)


def row_mask(n: int, m: int) -> Example:
    """The mask of groups whose members lie side by side."""
    groups = torch.export.Dim('groups', min=2)
    return Example(RowMask(n), (torch.randn(48, m),), ({0: groups},), _SHORT)


def _of_rows(masked: int) -> tuple[Tensor, Tensor | None, Any, Any, Any]:
    """A weight and a mask or None, with the sizes that vary, and those of a row."""
    rows, length = torch.export.Dim('rows', min=2), torch.export.Dim('length', min=2)
    both = {0: rows, 1: length}
    mask = torch.zeros(_ROWS, 32, dtype=MASK) if masked else None
    return torch.randn(_ROWS, 32), mask, both, both if masked else None, {0: rows}


def given_forward(masked: int) -> Example:
    """The forward pass under a mask that is given (1), or without one (0)."""
    w, mask, both, of_mask, row = _of_rows(masked)
    inputs = (w, mask, torch.ones(_ROWS, 1), torch.ones(len(SCALARS)))
    return Example(GivenForward(), inputs, (both, of_mask, row, None))


def weight_backward(masked: int) -> Example:
    """The backward pass under a mask (1), or without one (0)."""
    w, mask, both, of_mask, row = _of_rows(masked)
    step, powers = torch.ones(_ROWS, 1), [torch.ones(3, _ROWS) for _ in range(2)]
    inputs = (torch.randn_like(w), w, mask, step, *powers, torch.ones(len(SCALARS)))
    by_row = {1: row[0]}
    dynamic = (both, both, of_mask, row, by_row, by_row, None)
    return Example(WeightBackward(), inputs, dynamic)


def activation_forward() -> Example:
    """The activation quantizer over a flat tensor."""
    size = {0: torch.export.Dim('size', min=2)}
    inputs = (torch.randn(64), torch.ones(1), torch.ones(len(SCALARS)), torch.zeros(64))
    return Example(ActivationForward(), inputs, (size, None, None, size))


def activation_backward() -> Example:
    """Its backward pass over rows."""
    rows, length = torch.export.Dim('rows', min=2), torch.export.Dim('length', min=2)
    both = {0: rows, 1: length}
    inputs = (
        torch.randn(6, 16),
        torch.randn(6, 16),
        torch.ones(6, 1),
        torch.ones(len(SCALARS)),
        torch.zeros(6, 16),
        torch.zeros(6),
    )
    dynamic = (both, both, {0: rows}, None, both, {0: rows})
    return Example(ActivationBackward(), inputs, dynamic)


# By name; sizes that a kernel is made for are the arguments.
EXAMPLES: dict[str, Callable[..., Example]] = {
    'weight_forward': weight_forward,
    'thresholds': thresholds,
    'threshold_mask': threshold_mask,
    'row_mask': row_mask,
    'given_forward': given_forward,
    'weight_backward': weight_backward,
    'activation_forward': activation_forward,
    'activation_backward': activation_backward,
}
