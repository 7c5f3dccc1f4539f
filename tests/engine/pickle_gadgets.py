"""Pickles by hand, since torch.save writes only good ones, and gadgets that leave a marker."""

from __future__ import annotations

import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def unicode(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text.encode())) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return f'c{module}\n{attribute}\n'.encode()


def group(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b'R'


def program(*opcodes: bytes) -> bytes:
    return b'\x80\x02' + b''.join(opcodes) + b'.'


def read_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith('/data.pkl')))


def write_pickle(path: Path, data: bytes) -> None:
    """Puts ``data`` in place of the pickle of a zip checkpoint."""
    with zipfile.ZipFile(path) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for record, content in records.items():
            archive.writestr(record, data if record.endswith('/data.pkl') else content)


class Call:
    """Pickles as ``function(*arguments)``, and as ``BUILD state`` of its result."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


MODULE = 'slope_gadget_module'  # leaves the marker when it is imported


def touch(marker: Path) -> Call:
    return Call(os.system, f'touch {marker}')


def code(marker: Path) -> str:
    return f'open({str(marker)!r}, "w").close()'


SYSTEM = f'{os.system.__module__}.system'


def write_gadget(path: Path, gadget: Any, legacy: bool = False) -> None:
    if isinstance(gadget, bytes):
        torch.save({}, path)
        write_pickle(path, gadget)
    else:
        content = {'state_dict': {'w': torch.ones(2)}, 'more': gadget}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def appears(marker: Path) -> bool:
    for _ in range(200):  # a process may need a moment
        if marker.exists():
            return True
        time.sleep(0.02)
    return False
