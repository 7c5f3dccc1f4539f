"""Files that are there as a whole or not at all, whatever happens while they are written.

Content goes to a temporary name in the same folder, to the disk, and then to its place by one
rename. A process that dies in between leaves the older file as it was and a temporary one beside
it, which :func:`remove_partials` knows by its name.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

_PARTIAL = re.compile(r'\.(?P<target>.+)\.[0-9a-f]{8}\.part')


def write_whole(path: str | os.PathLike[str], content: bytes | bytearray) -> None:
    """Writes a file so that what stood there before stays until the new one is complete.

    Args:
        path: The file; a symbolic link is followed. What is no regular file (a pipe, a terminal) is
            written as it is.
        content: All of it.

    Raises:
        OSError: If that is impossible; the older file is unchanged and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(content)
        return
    # Names are limited in bytes.
    name = os.fsdecode(os.fsencode(target.name)[:200])
    partial = target.with_name(f'.{name}.{secrets.token_hex(4)}.part')
    try:
        with partial.open('xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The file is complete; some file systems cannot be asked to keep its name, too.
    with suppress(OSError):
        _sync_folder(target.parent)


def remove_partials(folder: str | os.PathLike[str], target: str = '*') -> list[str]:
    """Removes what dead processes left of files that they were writing into a folder.

    Args:
        folder: Where to look; nothing happens where there is none.
        target: Pattern of the names that the files would have had.

    Returns:
        The names that were removed.
    """
    place = Path(folder)
    removed = []
    for path in sorted(place.glob('.*.part')) if place.is_dir() else ():
        found = _PARTIAL.fullmatch(path.name)
        if found and Path(found['target']).match(target):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _sync_folder(folder: Path) -> None:
    # So that the rename, too, survives a power failure.
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
