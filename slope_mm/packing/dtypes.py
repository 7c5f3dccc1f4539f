"""safetensors' dtypes in numpy, which has no bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Little-endian, as in the file. bfloat16 is kept as its bits.
NUMPY_DTYPES: dict[str, Any] = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype('<u2'),
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}


def as_float32(stored: NDArray, dtype: str) -> NDArray:
    """bfloat16 bits as the same values in float32; everything else as it is."""
    if dtype != 'BF16':
        return stored
    return (stored.astype('<u4') << 16).view('<f4')


def to_dtype(values: NDArray, dtype: str) -> NDArray:
    """Values in a dtype, rounded to nearest, ties to even; bfloat16 as its bits."""
    if dtype != 'BF16':
        return values.astype(NUMPY_DTYPES[dtype], copy=False)
    if values.dtype == NUMPY_DTYPES['BF16']:
        return values
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype('<u2')
