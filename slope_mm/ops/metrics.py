"""What compression did to a weight, in figures. All return scalars without a graph.

Sums over a whole weight are in float64: in float32 those of a large layer are off by a thousandth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_mm.ops.quantization import Codes, positive


@torch.no_grad()
def cosine(w: Tensor, compressed: Tensor) -> Tensor:
    """Cosine of the angle between the flattened tensors; 1 if both are zero, 0 if one is."""
    a, b = w.double().flatten(), compressed.double().flatten()
    norms = torch.dot(a, a).sqrt() * torch.dot(b, b).sqrt()
    if not bool(norms) and torch.equal(a, b):
        return torch.ones((), device=w.device)
    return (torch.dot(a, b) / norms.clamp_min(torch.finfo(torch.float64).tiny)).float()


@torch.no_grad()
def sqnr_db(w: Tensor, compressed: Tensor) -> Tensor:
    """``10 log10(|w|^2 / |w - compressed|^2)`` in dB; +inf without error."""
    a = w.double().flatten()
    error = a - compressed.double().flatten()
    noise = torch.dot(error, error)
    ratio = torch.where(noise > 0, torch.dot(a, a) / noise, float('inf'))
    return (10 * torch.log10(ratio)).float()


@torch.no_grad()
def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """Share of mask entries that changed between two bool masks of one shape."""
    return (before ^ after).float().mean()


@torch.no_grad()
def clipped_share(w: Tensor, step: Tensor, codes: Codes, mask: Tensor | None = None) -> Tensor:
    """Share of the kept weights at or beyond the ends of the clip range (no gradient there)."""
    scaled = w / positive(step) - codes.offset
    outside = (scaled <= codes.qn) | (scaled >= codes.qp)
    if mask is None:
        return outside.float().mean()
    return (outside & mask).sum() / mask.sum().clamp_min(1)


@torch.no_grad()
def zero_share(compressed: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the kept weights that quantize to zero (a code spent on what the mask could say)."""
    zero = compressed == 0
    if mask is None:
        return zero.float().mean()
    return (zero & mask).sum() / mask.sum().clamp_min(1)
