"""Latent weights that lead to a given compressed weight: the same mask, the same codes.

A compressed weight alone says less than it seems: where a kept weight has code 0 it equals its
pruned neighbours, and the mask would be another one. So the latent weight keeps the values that
were rounded, held clear of what would round otherwise, and of the pruned weights, whose magnitudes
stay below those of the kept ones of their group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_mm.ops import Codes

# How far from its level a latent weight may lie, in steps; half a step rounds to the next level.
REACH = 0.45
# Magnitude of a pruned weight, at most, over the smallest kept one; far enough for half precision.
BELOW = 0.9
# A kept weight is never exactly zero, in steps (or in mean magnitudes, without quantization).
NUDGE = 1e-3


def latent_weight(
    corrected: Tensor,
    compressed: Tensor,
    mask: Tensor,
    step: Tensor | None,
    codes: Codes | None,
    group: int | None,
) -> Tensor:
    """The latent matrix of a compressed one.

    Args:
        corrected: ``[rows, columns]``: the values that were rounded or pruned.
        compressed: What they became; zeros where pruned.
        mask: True where kept.
        step: Steps, ``[rows, 1]``, or None.
        codes: The code set, or None.
        group: Consecutive columns among which the pattern chooses; None: the whole matrix.

    Returns:
        ``[rows, columns]`` in ``corrected``'s dtype.
    """
    latent = corrected
    if codes is not None and step is not None:
        level = compressed / step
        # Beyond the ends of the code set everything rounds to the end.
        low = torch.where(level <= codes.qn + codes.offset, -torch.inf, level - REACH)
        high = torch.where(level >= codes.qp + codes.offset, torch.inf, level + REACH)
        latent = (corrected / step).clamp(low, high) * step
        least = NUDGE * step
    else:
        latent = compressed
        least = NUDGE * corrected.abs().mean().clamp_min(1e-30)
    tiny = torch.where(latent < 0, -least, least)
    kept = torch.where(latent.abs() < least, tiny, latent)
    width = latent.numel() if group is None else group
    inside = mask.reshape(-1, width)
    smallest = kept.abs().reshape(-1, width).masked_fill(~inside, torch.inf).amin(1, keepdim=True)
    bound = (BELOW * smallest).expand(-1, width).reshape(latent.shape)
    pruned = corrected.clamp(-bound, bound)
    return torch.where(mask, kept, pruned)
