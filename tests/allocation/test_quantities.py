"""Budgets as text."""

from __future__ import annotations

import pytest

from slope_mm import ConfigError
from slope_mm.allocation.quantities import parse_operations, parse_size


@pytest.mark.parametrize(
    ('text', 'size'),
    [('8MB', 8_000_000), ('512 KiB', 524_288), ('1.5m', 1_500_000), ('77', 77), ('.5kb', 500)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ('text', 'count'), [('12.5G', 1.25e10), ('2TBOPs', 2e12), ('1e12', 1e12), ('3e2k', 3e5)]
)
def test_operations(text: str, count: float) -> None:
    assert parse_operations(text) == count


@pytest.mark.parametrize('text', ['', 'MB', '-3MB', '0', '8XB', '8 M B', 'nan', '1e999'])
def test_nonsense_is_named(text: str) -> None:
    for parse in (parse_size, parse_operations):
        with pytest.raises(ConfigError, match='is not a'):
            parse(text)
