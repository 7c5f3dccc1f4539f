"""Masks as bits: what a training step keeps of a mask between its forward and its backward pass.

On a CPU eight weights share a byte: an eighth of the memory, for a tenth of a nanosecond a weight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slope_mm.ops.tracing import is_compiling


def room_for(rows: Tensor) -> Tensor:
    """An empty mask of rows: bits on a CPU; elsewhere, and for torch.compile, booleans.

    Args:
        rows: ``[rows, length]``.

    Returns:
        uint8 ``[rows, ceil(length / 8)]``, or bool like ``rows``.
    """
    if rows.device.type != 'cpu' or is_compiling():
        return torch.empty_like(rows, dtype=torch.bool)
    return torch.empty(rows.shape[0], -(-rows.shape[1] // 8), dtype=torch.uint8)


def write(kept: Tensor, target: Tensor) -> None:
    """Writes 1 (kept) and 0 into a mask of :func:`room_for`.

    Args:
        kept: ``[rows, length]`` of zeros and ones.
        target: As many rows of the mask.
    """
    if target.dtype == torch.bool:
        target.copy_(kept)
    else:
        target.numpy()[:] = np.packbits(kept.bool().numpy(), axis=1)


def read(mask: Tensor, target: Tensor) -> Tensor:
    """Rows of a mask, bits or booleans, as zeros and ones.

    Args:
        mask: As :func:`room_for` makes it, or bool like ``target``.
        target: ``[rows, length]``, written to.

    Returns:
        ``target``.
    """
    if mask.dtype == torch.bool:
        # torch widens bytes to floats by vectors, booleans one by one.
        return target.copy_(mask.view(torch.uint8))
    bits = np.unpackbits(mask.numpy(), axis=1, count=target.shape[1])
    return target.copy_(torch.from_numpy(bits))
