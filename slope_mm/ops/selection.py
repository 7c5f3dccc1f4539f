"""Which members of a group are its largest, by vector minima and maxima instead of sorting.

The groups lie beside each other: a tensor ``[M, ...]`` holds member ``i`` of every group in its
slice ``i``, so that each comparison is one flat vector loop. Weights are read as rows, a block of
rows at a time that stays in a core's cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block for each thread: four or five fp32 buffers of it fit a core's cache.
BLOCK = 131072


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are worked on at once: equal shares of a weight; all of it on a GPU."""
    count = rows.shape[0]
    height = count
    if rows.device.type == 'cpu' and rows.numel():
        pieces = math.ceil(rows.numel() / (BLOCK * torch.get_num_threads()))
        height = math.ceil(count / min(pieces, count))
    for start in range(0, count, max(1, height)):
        yield slice(start, min(start + height, count))


class Scratch:
    """Buffers of one block each; on a CPU every thread keeps its own for the next pass.

    Fresh pages cost more than the arithmetic that is done in them. A pass never runs inside
    another one of the same thread, so a name is used by one pass at a time.
    """

    _kept = threading.local()

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        """Makes room for the largest block of ``rows``."""
        self._rows = max((b.stop - b.start for b in blocks(rows)), default=0)
        self._length, self._dtype, self._device = rows.shape[1], dtype, rows.device
        size = self._rows * self._length
        # A single row may be as long as a weight; that is not worth holding on to.
        self._keeps = rows.device.type == 'cpu' and size <= 4 * BLOCK * torch.get_num_threads()
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The buffer of a name, of the block's shape; its content is what was left there."""
        if name not in self._buffers:
            flat = self._room(name, self._rows * self._length)
            self._buffers[name] = flat.view(self._rows, self._length)
        return self._buffers[name][: like.shape[0]]

    def _room(self, name: str, size: int) -> Tensor:
        if not self._keeps:
            return torch.empty(size, dtype=self._dtype, device=self._device)
        kept = self._kept.__dict__
        key = f'{name} {self._dtype}'
        if key not in kept or kept[key].numel() < size:
            # What inference mode makes could not be written to by a training step.
            with torch.inference_mode(False):
                kept[key] = torch.empty(size, dtype=self._dtype)
        return kept[key][:size]


def keep(rows: Tensor, n: int, m: int, kernel: int, scratch: Scratch) -> Tensor:
    """1 where kept, 0 where pruned: the ``n`` largest magnitudes of every group along a row.

    Args:
        rows: One block, ``[rows, length]``, contiguous; ``length`` a multiple of ``m * kernel``.
        n: Kept members of a group.
        m: Group size.
        kernel: Distance of a group's members along a row.
        scratch: Buffers, fp32 or better.

    Returns:
        Tensor of ``rows``' shape: the scratch buffer ``'kept'``.
    """
    kept = scratch('kept', rows)
    members = scratch('members', rows).view(m, -1, kernel)
    torch.abs(members.copy_(rows.view(-1, m, kernel).transpose(0, 1)), out=members)
    marked = largest(members, n, out=scratch('marked', rows).view(m, -1, kernel))
    if kernel > 1:
        torch.stack(marked.unbind(0), 1, out=kept.view(-1, m, kernel))
    else:
        kept.view(-1, m, kernel).copy_(marked.transpose(0, 1))
    return kept


# What is compared at once: all members in one tensor, or each in its own (for a compiler to fuse).
Run = Tensor | tuple[Tensor, ...]


def kth_largest(members: Run, k: int) -> Tensor:
    """The ``k``-th largest of every group (from 1), by merging sorted runs pairwise.

    A tournament: runs of length 1, 2, 4, ... are merged by Batcher's bitonic network, and a run
    never grows beyond what can still hold the ``k``-th largest, so 2:16 costs about 1.5 times 2:4
    and not the eight times of comparing all pairs.

    Args:
        members: Magnitudes (not negative), ``[M, ...]`` or M tensors.
        k: From 1 to M.

    Returns:
        Tensor of one member's shape; NaN where a group holds NaN.
    """
    size = len(members)
    padding = (1 << (size - 1).bit_length()) - size
    if padding:
        # Below every magnitude: never among the largest of a group.
        lowest = torch.full_like(members[0], -1)
        if isinstance(members, Tensor):
            members = torch.cat([members, lowest.expand(padding, *lowest.shape)])
        else:
            members = (*members, *[lowest] * padding)
    limit = 1 << (k - 1).bit_length()
    # Run j of this list holds the j-th largest of every block, largest first.
    runs, count = [members], size + padding
    while count > 2:
        larger, smaller = _merge(runs, smaller=len(runs) < limit)
        runs = _sorted(larger) + _sorted(smaller)
        count //= 2
    if count == 1:
        return runs[k - 1][0]
    larger, smaller = _merge(runs, smaller=k > len(runs))
    return (_select(smaller, k - 1 - len(runs)) if smaller else _select(larger, k - 1))[0]


def _larger(a: Run, b: Run) -> Run:
    if isinstance(a, Tensor):
        return torch.maximum(a, b)  # type: ignore[arg-type]
    return tuple(torch.maximum(x, y) for x, y in zip(a, b, strict=True))


def _smaller(a: Run, b: Run) -> Run:
    if isinstance(a, Tensor):
        return torch.minimum(a, b)  # type: ignore[arg-type]
    return tuple(torch.minimum(x, y) for x, y in zip(a, b, strict=True))


def _halves(run: Run) -> tuple[Run, Run]:
    if isinstance(run, Tensor):
        first, second = run.chunk(2)
        return first, second
    return run[: len(run) // 2], run[len(run) // 2 :]


def _merge(runs: list[Run], smaller: bool) -> tuple[list[Run], list[Run]]:
    """The blocks of one half merged with the other's: larger and (if wanted) smaller parts.

    Both are bitonic.
    """
    halves = [_halves(run) for run in runs]
    pairs = [(halves[i][0], halves[-1 - i][1]) for i in range(len(runs))]
    rest = [_smaller(a, b) for a, b in pairs] if smaller else []
    return [_larger(a, b) for a, b in pairs], rest


def _sorted(bitonic: list[Run]) -> list[Run]:
    """A bitonic list in descending order."""
    half = len(bitonic) // 2
    if not half:
        return bitonic
    pairs = list(zip(bitonic[:half], bitonic[half:], strict=True))
    return _sorted([_larger(a, b) for a, b in pairs]) + _sorted([_smaller(a, b) for a, b in pairs])


def _select(bitonic: list[Run], index: int) -> Run:
    """Element ``index`` of a bitonic list's descending order; the rest is not sorted."""
    half = len(bitonic) // 2
    if not half:
        return bitonic[0]
    pairs = zip(bitonic[:half], bitonic[half:], strict=True)
    if index < half:
        return _select([_larger(a, b) for a, b in pairs], index)
    return _select([_smaller(a, b) for a, b in pairs], index - half)


def largest(members: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """Marks the ``n`` largest of every group with 1, the others with 0.

    Exactly ``n`` are marked: on a tie the lower index wins.

    Args:
        members: Magnitudes (not negative), ``[M, ...]``, fp32 or better.
        n: Marked members of each group.
        out: Where the marks may go on a CPU.

    Returns:
        Tensor of ``members``' shape and dtype; arbitrary where a group holds NaN.
    """
    threshold = kth_largest(members, n)
    # Only where the host need not wait for the count, and fp32 holds it exactly.
    if members.device.type != 'cpu' or members.numel() > 2**24:
        return _exactly(members, threshold, n)
    # As numbers: a comparison into booleans takes four times as long on a CPU.
    marked = torch.ge(members, threshold, out=torch.empty_like(members) if out is None else out)
    if float(marked.sum()) != n * threshold.numel():
        flat, groups = marked.flatten(1), marked.sum(0).flatten()
        ties = (groups != n).nonzero().squeeze(1)
        flat[:, ties] = _exactly(members.flatten(1)[:, ties], threshold.flatten()[ties], n)
    return marked


def _exactly(members: Tensor, threshold: Tensor, n: int) -> Tensor:
    """Marks what is above the threshold, and fills up with what equals it, in index order."""
    above, tied = members > threshold, members == threshold
    room = n - above.sum(0)
    return (above | (tied & (tied.cumsum(0) <= room))).to(members.dtype)
