"""Sparsity patterns: which weights are kept.

Symbols follow the SLOPE paper (arXiv 2511.08360): in ``N:M`` the first number counts what is
*kept* in every group of ``M`` consecutive input channels. A pattern is a small frozen object;
:func:`parse_pattern` makes one from a recipe's string, and ``PATTERNS`` is the table to extend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slope_mm.errors import RecipeError, TensorError
from slope_mm.ops.selection import Scratch, blocks, keep

MAX_GROUP = 32


def require_finite(w: Tensor, name: str = 'weight') -> None:
    """Refuses NaN and infinity.

    Args:
        w: Any floating tensor.
        name: How the message calls it.

    Raises:
        TensorError: If any element is NaN or infinite.
    """
    # A sum is one pass without a temporary; it may overflow on finite input, hence the recheck.
    if bool(torch.isfinite(w.detach().sum())) or bool(torch.isfinite(w).all()):
        return
    bad = int((~torch.isfinite(w)).sum())
    raise TensorError(
        f'{name} of shape {tuple(w.shape)} holds {bad} NaN or infinite values, so magnitudes cannot'
        ' be ranked; load an earlier checkpoint, or lower the learning rate and look at the loss'
    )


def nm_mask(w: Tensor, n: int, m: int, dim: int = 1, *, check_finite: bool = True) -> Tensor:
    """Keeps the ``n`` largest magnitudes of every ``m`` consecutive elements along ``dim``.

    Exactly ``n`` of each group are kept: on a tie the lower index wins.

    Args:
        w: Weight of any shape and floating dtype.
        n: Kept elements per group, ``1 <= n < m``.
        m: Group size, at most 32; ``w.shape[dim]`` must be a multiple of it.
        dim: The axis of consecutive elements: 1 for convolutions and linear layers (input
            channels), 0 for transposed convolutions.
        check_finite: Refuse NaN and infinity (one more pass, and a synchronisation on a GPU).

    Returns:
        Bool tensor of ``w``'s shape, True where kept.

    Raises:
        RecipeError: If ``n`` and ``m`` are not a valid pattern.
        TensorError: If there is no such axis, it is not divisible by ``m``, or ``w`` is not finite.
    """
    NMPattern(n, m).check(w, dim)
    dim = dim % w.dim()
    w = w.detach()
    if check_finite:
        require_finite(w)
    inner = math.prod(w.shape[dim + 1 :])
    rows = w.reshape(-1, m * inner).contiguous()
    mask = torch.empty(rows.shape, dtype=torch.bool, device=w.device)
    scratch = Scratch(rows, torch.promote_types(w.dtype, torch.float32))
    for block in blocks(rows):
        mask[block] = keep(rows[block], n, m, inner, scratch)
    return mask.view(w.shape)


def unstructured_mask(w: Tensor, density: float, *, check_finite: bool = True) -> Tensor:
    """Keeps the largest magnitudes of the whole tensor, wherever they lie.

    The comparison arm for N:M: ``round(density * numel)`` weights are kept, exactly; on a tie the
    lower flat index wins.

    Args:
        w: Weight of any shape and floating dtype.
        density: Share of kept weights, ``0 < density <= 1``.
        check_finite: Refuse NaN and infinity.

    Returns:
        Bool tensor of ``w``'s shape, True where kept.

    Raises:
        RecipeError: If the density is out of range.
        TensorError: If ``w`` is not finite.
    """
    UnstructuredPattern(density)
    w = w.detach()
    if check_finite:
        require_finite(w)
    flat = w.reshape(-1).abs()
    if flat.dtype == torch.float16:
        # Exact in fp32; torch 2.1 has no kthvalue for fp16 on the CPU.
        flat = flat.float()
    keep = round(density * flat.numel())
    if keep == 0:
        return torch.zeros_like(w, dtype=torch.bool)
    if keep == flat.numel():
        return torch.ones_like(w, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - keep + 1).values
    above = flat > threshold
    tied = flat == threshold
    # Fill up with tied elements in index order.
    room = keep - above.sum()
    mask = above | (tied & (tied.cumsum(0) <= room))
    return mask.reshape(w.shape)


class Pattern(Protocol):
    """What the rest of the package needs to know about a sparsity pattern."""

    @property
    def name(self) -> str:
        """The recipe's spelling."""

    @property
    def density(self) -> float:
        """Share of kept weights."""

    def fits(self, channels: int) -> bool:
        """Whether an input axis of this length can hold the pattern."""

    def mask(self, w: Tensor, dim: int, *, check_finite: bool = True) -> Tensor:
        """Bool mask of ``w``'s shape, True where kept."""

    def index_bits(self, numel: int) -> int:
        """Bits that store which of ``numel`` weights are kept."""

    def kept(self, numel: int) -> int:
        """Number of kept weights out of ``numel``."""


@dataclass(frozen=True)
class NMPattern:
    """``n`` kept out of every ``m`` consecutive input channels.

    Raises:
        RecipeError: Unless ``1 <= n < m <= 32``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= MAX_GROUP:
            hint = f"; did you mean '{self.m}:{self.n}'?" if 1 <= self.m < self.n else ''
            raise RecipeError(
                f"sparsity '{self.n}:{self.m}' is not a pattern: N of N:M counts the kept weights,"
                f' so 1 <= N < M <= {MAX_GROUP}{hint}'
            )

    @property
    def name(self) -> str:
        return f'{self.n}:{self.m}'

    @property
    def density(self) -> float:
        return self.n / self.m

    def fits(self, channels: int) -> bool:
        return channels % self.m == 0

    def check(self, w: Tensor, dim: int) -> None:
        """Refuses a weight that holds no whole groups along an axis.

        Raises:
            TensorError: If there is no such axis, or it is not divisible by ``m``.
        """
        if not -w.dim() <= dim < w.dim():
            raise TensorError(
                f'a weight of shape {tuple(w.shape)} has no axis {dim}; give the axis of its input'
                ' channels'
            )
        if w.shape[dim] % self.m:
            raise TensorError(
                f'axis {dim % w.dim()} of a weight of shape {tuple(w.shape)} is not divisible by'
                f' {self.m}, so it holds no {self.name} groups; choose another pattern or leave'
                ' this layer dense'
            )

    def mask(self, w: Tensor, dim: int, *, check_finite: bool = True) -> Tensor:
        return nm_mask(w, self.n, self.m, dim, check_finite=check_finite)

    def index_bits(self, numel: int) -> int:
        """Enumerative index: ceil(log2 C(m, n)) bits a group."""
        return numel // self.m * math.ceil(math.log2(math.comb(self.m, self.n)))

    def kept(self, numel: int) -> int:
        return numel // self.m * self.n


@dataclass(frozen=True)
class UnstructuredPattern:
    """The largest magnitudes of a layer at a given density (share of *kept* weights).

    Raises:
        RecipeError: Unless ``0 < density <= 1``.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(
                f"sparsity 'unstructured:{self.share}' is not a pattern: the number is the share of"
                ' kept weights, above 0 and at most 1'
            )

    @property
    def name(self) -> str:
        # The shortest spelling that reads back as the same number.
        return f'unstructured:{self.share}'

    @property
    def density(self) -> float:
        return self.share

    def fits(self, channels: int) -> bool:
        return True

    def mask(self, w: Tensor, dim: int, *, check_finite: bool = True) -> Tensor:
        return unstructured_mask(w, self.share, check_finite=check_finite)

    def index_bits(self, numel: int) -> int:
        """A bitmask: one bit a weight."""
        return numel

    def kept(self, numel: int) -> int:
        return round(self.share * numel)


# Each row: the spelling in a recipe, and how its groups of digits become a pattern.
PATTERNS: dict[str, Callable[..., Pattern]] = {
    r'(\d+):(\d+)': lambda n, m: NMPattern(int(n), int(m)),
    r'unstructured:(\d*\.?\d+(?:e-?\d+)?)': lambda share: UnstructuredPattern(float(share)),
}


def parse_pattern(text: str) -> Pattern:
    """Makes a pattern from ``'N:M'`` or ``'unstructured:DENSITY'``.

    Raises:
        RecipeError: If no row of ``PATTERNS`` reads the text, or its numbers are impossible.
    """
    if isinstance(text, str):
        for spelling, make in PATTERNS.items():
            found = re.fullmatch(spelling, text.strip())
            if found:
                return make(*found.groups())
    raise RecipeError(
        f"sparsity {text!r} is not a pattern; write 'N:M' (N kept of M, for example '2:4'),"
        " 'unstructured:0.5' (share of kept weights) or None for dense"
    )
