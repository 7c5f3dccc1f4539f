"""Weights to compress, and masks and codes computed one weight after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slope_mm.ops import Codes, step_shape

# Shape, input axis, output axis.
WEIGHTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    'conv': ((6, 8, 3, 2), 1, 0),
    'linear': ((6, 16), 1, 0),
    'transposed conv': ((8, 6, 2, 3), 0, 1),
}


def random_tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_for(shape: tuple[int, ...], axis: int | None, codes: Codes) -> Tensor:
    """Steps of different sizes that clip some of a normal distribution."""
    uniform = torch.rand(step_shape(shape, axis), generator=torch.Generator().manual_seed(1))
    return (0.5 + uniform) * 1.5 / codes.largest


def slow_nm(w: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    mask = np.zeros(w.shape, dtype=bool)
    groups = np.moveaxis(w, axis, -1)
    kept = np.moveaxis(mask, axis, -1)
    for place in np.ndindex(*groups.shape[:-1]):
        for first in range(0, groups.shape[-1], m):
            group = groups[place][first : first + m]
            for k in sorted(range(m), key=lambda k: -abs(group[k]))[:n]:
                kept[place][first + k] = True
    return mask


def slow_compress(
    w: np.ndarray, step: np.ndarray | None, mask: np.ndarray | None, codes: Codes | None
) -> np.ndarray:
    """Sparsify first, quantize second, one weight after the other in fp32."""
    result = np.zeros(w.shape, dtype=np.float32)
    for index in np.ndindex(*w.shape):
        if mask is not None and not mask[index]:
            continue
        value = np.float32(w[index])
        if codes is not None and step is not None:
            s = np.float32(np.broadcast_to(step, w.shape)[index])
            offset = np.float32(codes.offset)
            code = np.clip(np.rint(value / s - offset), codes.qn, codes.qp)
            value = (np.float32(code) + offset) * s
        result[index] = value
    return result


def clip_range(codes: Codes) -> tuple[float, float]:
    return codes.qn + codes.offset, codes.qp + codes.offset
