"""The passes of weights and activations as one loop each, for a compiler to make kernels of.

A kernel writes into tensors that it is given and returns nothing. Which members of a group are kept
is found without laying the groups out: a member's rank is counted by comparing it with the others
of its group, which lie a multiple of ``kernel`` positions away along the row, so that every load is
contiguous whatever the kernel size, and one compiled loop serves all layers of a group size.

Equal magnitudes are not told apart, which would cost as much again. Each kernel counts what it kept
a row: where that is more than N of each group, equal ones stood at the limit, and the row has to be
done over by a pass that knows which of them stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Finite in fp32: times a gradient of zero it stays zero.
LARGEST = 3e38
# Scalars of a kernel, in this order: an fp32 vector, so that other values need no other kernel.
SCALARS = ('low', 'high', 'offset', 'kept', 'pruned_share', 'decay')


def _kept(w: Tensor, others: Sequence[Tensor], member: Tensor, count: Tensor) -> Tensor:
    """Which weights are among their group's ``count`` largest, all that are equal at the limit.

    Args:
        w: ``[rows, length]``.
        others: For each distance from 1 to M - 1 the weights that many members on, and those of the
            same cyclic distance before; what belongs to another group is not looked at.
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


def _level(scaled: Tensor, scalars: Tensor) -> Tensor:
    """``x / step`` to levels in units of the step."""
    return torch.clamp(torch.round(scaled - scalars[2]), scalars[0], scalars[1]) + scalars[2]


class WeightForward(nn.Module):
    """Compressed rows, and of each the sums ``w·w``, ``w·ŵ``, ``ŵ·ŵ`` and what was kept."""

    def forward(
        self,
        w: Tensor,
        others: list[Tensor],
        member: Tensor,
        step: Tensor,
        scalars: Tensor,
        compressed: Tensor,
        latent_power: Tensor,
        product: Tensor,
        level_power: Tensor,
        kept_count: Tensor,
    ) -> tuple[()]:
        level = _level(w / step, scalars) * step
        if others:
            # As a number: a boolean that is used twice would be stored, and read a byte at a time.
            kept = _kept(w, others, member, scalars[3]).to(torch.float32)
            level = level * kept
            kept_count.copy_(kept.sum(1))
        compressed.copy_(level)
        latent_power.copy_((w * w).sum(1))
        product.copy_((w * level).sum(1))
        level_power.copy_((level * level).sum(1))
        return ()


class WeightBackward(nn.Module):
    """The gradient of rows, and the step's: one value a row, as what was kept."""

    def forward(
        self,
        grad: Tensor,
        w: Tensor,
        others: list[Tensor],
        member: Tensor,
        step: Tensor,
        by_latent: Tensor,
        by_level: Tensor,
        scalars: Tensor,
        grad_w: Tensor,
        grad_step: Tensor,
        kept_count: Tensor,
    ) -> tuple[()]:
        scaled = w / step
        level = _level(scaled, scalars)
        low, high = scalars[0] + scalars[2], scalars[1] + scalars[2]
        passed = torch.where((scaled > low) & (scaled < high), grad, 0.0)
        by_step = grad * level - passed * scaled
        if others:
            kept = _kept(w, others, member, scalars[3])
            kept_count.copy_(kept.to(torch.float32).sum(1))
            level = torch.where(kept, level, 0.0)
            by_step = torch.where(kept, by_step, 0.0)
            passed = torch.where(kept, passed, grad * scalars[4] + w * scalars[5])
        grad_w.copy_(passed + (w * by_latent + level * step * by_level))
        grad_step.copy_(by_step.sum(1))
        return ()


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
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    dynamic: tuple[Any, ...]


def weight_forward(m: int) -> Example:
    """The forward pass for groups of ``m``; 1 for no groups."""
    rows, length = torch.export.Dim('rows', min=2), torch.export.Dim('length', min=2)
    both, row = {0: rows, 1: length}, {0: rows}
    others = [torch.randn(6, 8 * m) for _ in range(2 * (m - 1))]
    inputs = (
        torch.randn(6, 8 * m),
        others,
        torch.zeros(8 * m),
        torch.ones(6, 1),
        torch.ones(len(SCALARS)),
        torch.randn(6, 8 * m),
        *(torch.zeros(6) for _ in range(4)),
    )
    dynamic = (both, [both for _ in others], {0: length}, row, None, both, row, row, row, row)
    return Example(WeightForward(), inputs, dynamic)


def weight_backward(m: int) -> Example:
    """The backward pass for groups of ``m``; 1 for no groups."""
    rows, length = torch.export.Dim('rows', min=2), torch.export.Dim('length', min=2)
    both, row = {0: rows, 1: length}, {0: rows}
    others = [torch.randn(6, 8 * m) for _ in range(2 * (m - 1))]
    inputs = (
        torch.randn(6, 8 * m),
        torch.randn(6, 8 * m),
        others,
        torch.zeros(8 * m),
        *(torch.ones(6, 1) for _ in range(3)),
        torch.ones(len(SCALARS)),
        torch.randn(6, 8 * m),
        *(torch.zeros(6) for _ in range(2)),
    )
    around = [both for _ in others]
    dynamic = (both, both, around, {0: length}, row, row, row, None, both, row, row)
    return Example(WeightBackward(), inputs, dynamic)


def activation_forward(_: int) -> Example:
    """The activation quantizer over a flat tensor."""
    size = {0: torch.export.Dim('size', min=2)}
    inputs = (torch.randn(64), torch.ones(1), torch.ones(len(SCALARS)), torch.zeros(64))
    return Example(ActivationForward(), inputs, (size, None, None, size))


def activation_backward(_: int) -> Example:
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


EXAMPLES: dict[str, Callable[[int], Example]] = {
    'weight_forward': weight_forward,
    'weight_backward': weight_backward,
    'activation_forward': activation_forward,
    'activation_backward': activation_backward,
}
