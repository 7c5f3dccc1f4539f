"""Mean and spread over seeds, and paired differences with Student's t interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of one figure over seeds.

    Attributes:
        n: Number of seeds.
        mean: Arithmetic mean.
        deviation: Sample standard deviation (n - 1 in the denominator); None for a single seed.
    """

    n: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of the differences between two arms, seed by seed.

    Attributes:
        n: Number of seeds that both arms have.
        mean: Arm minus base.
        half_width: Half of the 95 % interval; None for a single seed.
    """

    n: int
    mean: float
    half_width: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(n, mean, None)
    return Summary(n, mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1)))


def paired_difference(arm: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Compares two arms on the seeds that both have.

    The interval is ``mean ± t(0.975, n - 1) * s / sqrt(n)`` with the standard deviation ``s`` of
    the differences: what a seed's start and data order do to both arms drops out.

    Args:
        arm: Figure by seed.
        base: The same of what it is compared with.

    Returns:
        The difference, or None without a common seed.
    """
    common = sorted(arm.keys() & base.keys())
    if not common:
        return None
    summary = summarize([arm[seed] - base[seed] for seed in common])
    if summary.deviation is None:
        return Difference(1, summary.mean, None)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, summary.n - 1))
    return Difference(summary.n, summary.mean, quantile * summary.deviation / math.sqrt(summary.n))
