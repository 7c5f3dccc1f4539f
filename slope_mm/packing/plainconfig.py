"""Configs as JSON: tuples, infinite numbers and keys of any kind survive, and nothing but data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slope_mm.errors import PackedFileError

TUPLE, NUMBER, ITEMS = '__tuple__', '__number__', '__items__'


def to_plain(value: Any, where: str) -> Any:
    """What JSON can hold; a class becomes its name, as a registry knows it.

    Raises:
        PackedFileError: If a value is neither; names its place.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
        return {ITEMS: [[to_plain(pair, where) for pair in item] for item in value.items()]}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f'{where}.{key}') for key, item in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [to_plain(item, where) for item in value]}
    if isinstance(value, (list, set, frozenset)):
        return [to_plain(item, where) for item in value]
    if isinstance(value, type):
        return value.__name__
    if hasattr(value, 'tolist'):
        # Arrays, and the numbers of numpy.
        return to_plain(value.tolist(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {NUMBER: str(float(value))}
    raise PackedFileError(
        f'{where} is a {type(value).__name__}, which a packed file cannot hold; give numbers,'
        ' texts, lists and dicts'
    )


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain`."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE} and isinstance(value[TUPLE], list):
        return tuple(from_plain(item) for item in value[TUPLE])
    if value.keys() == {NUMBER} and value[NUMBER] in ('inf', '-inf', 'nan'):
        return float(value[NUMBER])
    if value.keys() == {ITEMS}:
        pairs = from_plain(value[ITEMS])
        if isinstance(pairs, list) and all(_is_item(pair) for pair in pairs):
            try:
                return dict(pairs)
            except TypeError:
                raise PackedFileError('the header has a dict whose key is a list') from None
    return {key: from_plain(item) for key, item in value.items()}


def _is_item(pair: Any) -> bool:
    return (
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (int, float, str, tuple))
    )
