"""Which N of M: a group's mask as its rank among all masks with N of M bits set.

The rank is that of the combinatorial number system (colexicographic order): kept positions
``p_1 < p_2 < ... < p_N`` in ``0 .. M-1`` have rank ``C(p_1, 1) + C(p_2, 2) + ... + C(p_N, N)``,
which runs from 0 to ``C(M, N) - 1``. For 2:4 the masks with positions 01, 02, 12, 03, 13, 23 are 0
to 5.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

# Up to this group size one table lists all masks (12,870 at most).
TABLE_LIMIT = 16


def rank_bits(n: int, m: int) -> int:
    """``ceil(log2 C(M, N))``: bits of one rank."""
    return (math.comb(m, n) - 1).bit_length()


@functools.lru_cache(maxsize=64)
def _binomials(n: int, m: int) -> NDArray[np.int64]:
    """``C(p, i)`` for positions ``p < m`` (rows) and ``i <= n`` (columns)."""
    return np.array([[math.comb(p, i) for i in range(n + 1)] for p in range(m)], np.int64)


def _ranks_by_counting(masks: NDArray[np.bool_], n: int) -> NDArray[np.uint32]:
    m = masks.shape[1]
    binomials = _binomials(n, m)
    rank = np.zeros(len(masks), np.int64)
    ordinal = np.zeros(len(masks), np.int64)
    for position in range(m):
        kept = masks[:, position]
        ordinal += kept
        rank += binomials[position][ordinal] * kept
    return rank.astype(np.uint32)


def _masks_by_counting(ranks: NDArray[np.unsignedinteger], n: int, m: int) -> NDArray[np.bool_]:
    binomials = _binomials(n, m)
    left = ranks.astype(np.int64)
    ordinal = np.full(len(ranks), n)
    masks = np.zeros((len(ranks), m), np.bool_)
    for position in range(m - 1, -1, -1):
        count = binomials[position][ordinal]
        kept = (left >= count) & (ordinal > 0)
        masks[:, position] = kept
        left -= count * kept
        ordinal -= kept
    return masks


@functools.lru_cache(maxsize=64)
def _tables(n: int, m: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Rank by mask (bit ``p`` of the index is position ``p``), and mask by rank."""
    masks = _masks_by_counting(np.arange(math.comb(m, n), dtype=np.uint32), n, m)
    rank = np.zeros(2**m, np.uint16)
    rank[masks @ (1 << np.arange(m))] = np.arange(len(masks))
    return rank, masks


def group_ranks(masks: NDArray[np.bool_], n: int) -> NDArray[np.unsignedinteger]:
    """Ranks of groups.

    Args:
        masks: ``[groups, M]``, exactly ``n`` True in every row.
        n: Kept elements a group.

    Returns:
        ``[groups]``, below ``C(M, N)``.
    """
    m = masks.shape[1]
    if m > TABLE_LIMIT:
        return _ranks_by_counting(masks, n)
    word = np.zeros(len(masks), np.uint8 if m <= 8 else np.uint16)
    for position in range(m):
        word |= masks[:, position].astype(word.dtype) << position
    return _tables(n, m)[0][word]


def group_masks(ranks: NDArray[np.unsignedinteger], n: int, m: int) -> NDArray[np.bool_]:
    """The inverse of :func:`group_ranks`; ranks have to be below ``C(M, N)``."""
    if m > TABLE_LIMIT:
        return _masks_by_counting(ranks, n, m)
    return _tables(n, m)[1][ranks]
