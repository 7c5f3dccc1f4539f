"""Means, deviations and paired intervals, against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from slope_mm.studies.statistics import paired_difference, summarize


def test_mean_and_deviation_are_those_of_numpy() -> None:
    values = [0.41, 0.44, 0.39, 0.47, 0.40]
    summary = summarize(values)
    assert summary.n == 5
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.deviation == pytest.approx(np.std(values, ddof=1))


def test_one_seed_has_no_spread() -> None:
    assert summarize([0.4]).deviation is None
    difference = paired_difference({0: 0.5}, {0: 0.4})
    assert difference is not None
    assert (difference.half_width, difference.decided) == (None, False)
    assert difference.mean == pytest.approx(0.1)


@pytest.mark.parametrize('n', [2, 3, 5, 12])
def test_the_interval_is_that_of_scipys_paired_test(n: int) -> None:
    noise = np.random.default_rng(n)
    base = noise.normal(0.4, 0.05, n)
    arm = base + noise.normal(0.02, 0.01, n)
    found = paired_difference(dict(enumerate(arm)), dict(enumerate(base)))
    expected = stats.ttest_rel(arm, base).confidence_interval(0.95)
    assert found is not None and found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.decided == (stats.ttest_rel(arm, base).pvalue < 0.05)


def test_the_interval_of_three_seeds_by_hand() -> None:
    # Differences 1, 2, 3: s = 1; t(0.975, 2) = 4.3027 (any table).
    found = paired_difference({0: 11, 1: 22, 2: 33}, {0: 10, 1: 20, 2: 30})
    assert found is not None
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert not found.decided


def test_only_common_seeds_count() -> None:
    found = paired_difference({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.5, 1: 1.5, 9: -100.0})
    assert found is not None
    assert (found.n, found.mean) == (2, 0.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
