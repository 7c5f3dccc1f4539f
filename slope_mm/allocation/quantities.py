"""Budgets as people write them: ``8MB``, ``12.5G``."""

from __future__ import annotations

import re

from slope_mm.errors import ConfigError

_DECIMAL = {'': 1, 'k': 10**3, 'm': 10**6, 'g': 10**9, 't': 10**12, 'p': 10**15}
_BINARY = {'ki': 2**10, 'mi': 2**20, 'gi': 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``'8MB'``, ``'512 KiB'`` or ``'8000000'``; k, M, G are powers of 1000.

    Raises:
        ConfigError: If it is no positive size.
    """
    return int(_parsed(text, 'b?', {**_DECIMAL, **_BINARY}, "a size such as '8MB' or '512KiB'"))


def parse_operations(text: str) -> float:
    """Bit operations of ``'12.5G'``, ``'2T'`` or ``'1e12'``.

    Raises:
        ConfigError: If it is no positive number.
    """
    return _parsed(text, '(bops)?', _DECIMAL, "a number of bit operations such as '12.5G'")


def _parsed(text: str, unit: str, factors: dict[str, int], wanted: str) -> float:
    prefixes = '|'.join(sorted(factors, key=len, reverse=True))
    number = r'(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)'
    found = re.fullmatch(rf'\s*{number}\s*({prefixes}){unit}\s*', text.lower())
    value = float(found[1]) * factors[found[2]] if found else 0.0
    if not 0 < value < float('inf'):
        raise ConfigError(f'{text!r} is not {wanted}')
    return value
