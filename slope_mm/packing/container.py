"""The container: a safetensors file with checksums over every byte of it.

A safetensors file is a u64 (length of the header), the header (JSON), and the tensors' bytes. Ours
has one metadata entry, ``slope_mm``: a JSON text, the packed file's own header (docs/format.md).
Its ``crc32`` lists the CRC-32 of every tensor in the order of their names; that of the u64 and the
safetensors header is the tensor ``:header_crc32``.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from slope_mm.errors import PackedFileError
from slope_mm.packing.dtypes import NUMPY_DTYPES
from slope_mm.wholefile import write_whole

#: Written where version 1 can say it, so that older readers read the file; else the newest.
VERSIONS = (1, 2)
METADATA_KEY = 'slope_mm'
HEADER_CRC = ':header_crc32'
# What safetensors itself allows.
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file.

    Attributes:
        dtype: safetensors' name of its type.
        shape: Its shape.
        data: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def array(self) -> NDArray:
        """As numpy reads it; bfloat16 as its bits (uint16)."""
        return self.data.view(NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Container:
    """A file whose checksums were right.

    Attributes:
        header: The packed file's header.
        tensors: The tensors by name, without the header's checksum.
    """

    header: dict[str, Any]
    tensors: dict[str, StoredTensor]


# --- reading -------------------------------------------------------------------------------------


def is_packed(head: bytes) -> bool:
    """Whether a file that begins with these bytes (nine or more) may be a packed one."""
    return len(head) > 8 and head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < 2**32


def read_container(path: str | os.PathLike[str]) -> Container:
    """Reads a packed file and compares all checksums.

    Raises:
        PackedFileError: If it is missing, no packed file, of another version, or damaged.
    """
    name = os.fspath(path)
    return parse_container(_read_bytes(name), name)


def _read_bytes(name: str) -> bytes:
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise PackedFileError(f'{name} is a directory; name the packed file in it')
        if not stat.S_ISREG(mode):
            raise PackedFileError(f'{name} is no regular file; give the path of a packed file')
        return Path(name).read_bytes()
    except FileNotFoundError:
        raise PackedFileError(f'there is no packed file {name}; check the path') from None
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise PackedFileError(f'{name} cannot be read ({reason}); check the path') from None


def parse_container(data: bytes, name: str) -> Container:
    """As :func:`read_container`, of a file's content; ``name`` is for messages."""
    if not is_packed(data[:9]):
        raise PackedFileError(
            f'{name} is no packed file: it does not begin as one; give a file of save_packed'
        )
    size = int.from_bytes(data[:8], 'little')
    if size > min(len(data) - 8, LARGEST_HEADER):
        raise PackedFileError(
            f'{name} is truncated in its header: {len(data)} bytes; copy or write it again'
        )
    try:
        stored = safetensors.deserialize(data)
    except Exception as error:
        raise PackedFileError(
            f'{name} is truncated or damaged: {str(error)[:200]}; copy or write it again'
        ) from None
    header = _parse_header(data[8 : 8 + size], name)
    tensors = {key: _stored(key, value, name) for key, value in sorted(stored, key=lambda t: t[0])}
    _check_sums(data[: 8 + size], header, tensors, name)
    return Container(header, tensors)


def _parse_header(text: bytes, name: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text).get('__metadata__', {})
        if METADATA_KEY not in metadata:
            raise PackedFileError(
                f'{name} is a safetensors file, but none of save_packed; give a packed file'
            )
        header = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise PackedFileError(f'the header of {name} is damaged; copy or write it again') from None
    version = header.get('version') if isinstance(header, dict) else None
    if version not in VERSIONS or isinstance(version, bool):
        raise PackedFileError(
            f'{name} has format version {version!r}, and this slope_mm reads versions'
            f' {VERSIONS[0]} to {VERSIONS[-1]}; use a newer slope_mm, or write the file again'
        )
    return header


def _stored(key: str, value: dict[str, Any], name: str) -> StoredTensor:
    dtype, shape = value['dtype'], tuple(value['shape'])
    if dtype not in NUMPY_DTYPES:
        raise PackedFileError(f"tensor '{key}' of {name} has the unknown dtype {dtype}")
    return StoredTensor(dtype, shape, np.frombuffer(value['data'], np.uint8))


def _check_sums(
    head: bytes, header: dict[str, Any], tensors: dict[str, StoredTensor], name: str
) -> None:
    own = tensors.pop(HEADER_CRC, None)
    if own is None or own.data.tobytes() != zlib.crc32(head).to_bytes(4, 'little'):
        raise PackedFileError(
            f"the header of {name} is damaged: the checksum '{HEADER_CRC}' differs; copy or write"
            ' it again'
        )
    sums = header.get('crc32')
    if not isinstance(sums, list) or len(sums) != len(tensors):
        raise PackedFileError(f'{name} does not list a checksum for each of its tensors')
    for (key, tensor), expected in zip(tensors.items(), sums, strict=True):
        if crc32(tensor.data) != expected:
            raise PackedFileError(
                f"tensor '{key}' of {name} is damaged: its checksum differs; copy or write the"
                ' file again'
            )


# --- writing -------------------------------------------------------------------------------------


def to_text(header: dict[str, Any]) -> str:
    """The header as JSON, as it is stored."""
    return json.dumps(header, separators=(',', ':'), ensure_ascii=False, allow_nan=False)


def crc32(data: NDArray[np.uint8]) -> int:
    """CRC-32 (zlib's, that of PNG and gzip)."""
    return zlib.crc32(data.data)


def checksums(tensors: dict[str, NDArray[np.uint8]]) -> list[int]:
    """CRC-32 of the tensors' bytes in the order of their names."""
    return [crc32(tensors[key]) for key in sorted(tensors)]


def sign_header(content: bytearray) -> None:
    """Puts the header's checksum into its tensor."""
    size = int.from_bytes(content[:8], 'little')
    entry = json.loads(bytes(content[8 : 8 + size]))[HEADER_CRC]
    start = 8 + size + entry['data_offsets'][0]
    content[start : start + 4] = zlib.crc32(content[: 8 + size]).to_bytes(4, 'little')


def write_atomically(path: str | os.PathLike[str], content: bytes | bytearray) -> None:
    """Writes a file so that what stood there before stays until the new one is complete.

    Raises:
        PackedFileError: If that is impossible; nothing is left behind.
    """
    target = Path(path)
    if target.is_dir():
        raise PackedFileError(f'{target} is a directory; name a file in it')
    try:
        write_whole(target, content)
    except OSError as error:
        raise PackedFileError(
            f'{target} cannot be written ({error.strerror}); nothing was changed. Make room there,'
            ' or choose another place'
        ) from error
