"""What the tests of quantizers share: code sets, shapes of weights and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = range(2, 9)
ALL_CODES = [(name, bits) for name in ('lsq', 'symmetric', 'odd') for bits in BITS]
# Weights and the axis of their output channels.
WEIGHTS: dict[str, tuple[tuple[int, ...], int]] = {
    'conv': ((5, 4, 3, 2), 0),
    'linear': ((6, 12), 0),
    'transposed conv': ((4, 5, 2, 3), 1),
}


def levels(name: str, bits: int) -> list[float]:
    """The code sets as the design writes them, in units of the step."""
    half = 2 ** (bits - 1)
    return {
        'lsq': [float(k) for k in range(-half, half)],
        'symmetric': [float(k) for k in range(1 - half, half)],
        'odd': [k / 2 for k in range(1 - 2 * half, 2 * half, 2)],
    }[name]


def random_tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
