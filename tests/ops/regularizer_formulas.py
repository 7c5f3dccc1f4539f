"""The formulas of the regularizers, one item after the other, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor


def items(x: Tensor, granularity: str, axis: int) -> list[Tensor]:
    """The regularized items, as flat tensors in double precision."""
    if granularity == 'layer':
        return [x.double().flatten()]
    return [x.double().select(axis, i).flatten() for i in range(x.shape[axis])]


def reference(name: str, w: Tensor, compressed: Tensor, granularity: str, axis: int) -> Tensor:
    """The formulas of the design, one item after the other."""
    pairs = zip(items(w, granularity, axis), items(compressed, granularity, axis), strict=True)
    if name == 'cosine':
        return torch.stack([1 - (a @ b) / (a.norm() * b.norm()) for a, b in pairs])
    return torch.stack([(a - b).square().sum() / a.square().sum() for a, b in pairs])
