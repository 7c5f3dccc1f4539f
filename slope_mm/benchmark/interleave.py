"""Timing several arms in turn, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """A median and the middle half around it.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Seconds of every arm in every round.

    Attributes:
        seconds: Arm to its seconds, one a round; the rounds of all arms belong together.
    """

    seconds: dict[str, list[float]]

    def time(self, arm: str) -> Spread:
        """Seconds of an arm."""
        return Spread.of(self.seconds[arm])

    def ratio(self, arm: str, baseline: str) -> Spread:
        """An arm's time by the baseline's, compared round by round."""
        pairs = zip(self.seconds[arm], self.seconds[baseline], strict=True)
        return Spread.of([a / b for a, b in pairs])

    def rows(self, baseline: str, **more: Any) -> list[dict[str, Any]]:
        """One row an arm: median and quartiles of time (ms) and of the ratio to the baseline."""
        result = []
        for arm in self.seconds:
            time_, ratio = self.time(arm), self.ratio(arm, baseline)
            result.append(
                dict(
                    **more,
                    arm=arm,
                    ms=1e3 * time_.median,
                    ms_low=1e3 * time_.low,
                    ms_high=1e3 * time_.high,
                    ratio=ratio.median,
                    ratio_low=ratio.low,
                    ratio_high=ratio.high,
                )
            )
        return result


# mallopt's names for its settings, and values: mapped on their own are blocks above the largest
# size that glibc takes for it (HEAP_MAX / 2), returned is what is free above the other.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 1 << 30, 32 << 20


def keep_pages() -> bool:
    """Has this process keep the memory that it frees.

    Whether the C library hands a large block back, and the system has to clear its pages again,
    depends on what else the process has freed: it may double what one and the same arm takes.

    Returns:
        Whether the C library knows how (glibc does).
    """
    try:
        set_to = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(set_to(_MMAP_THRESHOLD, _LARGEST)) and bool(set_to(_TRIM_THRESHOLD, _KEPT))


def interleave(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    progress: Callable[[str], None] | None = None,
) -> Timings:
    """Runs every arm once a round, in turn; on a GPU waits for the work to end.

    The order turns by one each round, so that no arm always follows the same other one.

    Args:
        arms: Name to what is timed.
        rounds: Counted rounds.
        warmup: Rounds before that, not counted.
        progress: Called with a line after each round.

    Returns:
        The timings.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                # Otherwise one arm's garbage is collected on another one's time.
                gc.collect()
                elapsed = _timed(arms[name])
                if index >= warmup:
                    seconds[name].append(elapsed)
            if progress is not None and index >= warmup:
                last = ', '.join(f'{name} {1e3 * seconds[name][-1]:.0f} ms' for name in names)
                progress(f'round {index - warmup + 1}/{rounds}: {last}')
    finally:
        if collecting:
            gc.enable()
    return Timings(seconds)


def _timed(run: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
