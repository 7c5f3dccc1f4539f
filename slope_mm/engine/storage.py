"""Checkpoints that are complete or not there, and the newest of them.

mmengine writes a checkpoint through the file backend that is registered for local paths, straight
into its place: a process that is killed meanwhile leaves half a file, and where it replaces an
older one, nothing else. :class:`WholeFileBackend` takes that backend's place.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log

from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.errors import CheckpointError, StorageError
from slope_mm.wholefile import write_whole

# What mmengine's checkpoint hook calls its pointer to the newest checkpoint.
POINTER = 'last_checkpoint'


class WholeFileBackend(LocalBackend):
    """mmengine's local file backend; what it writes appears as a whole.

    ``put`` and ``put_text`` are those of ``LocalBackend`` but for that: checkpoints of every run,
    and what ``mmengine.dump`` writes.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes; folders that are missing are made.

        Raises:
            StorageError: If that is impossible; what stood there before is unchanged.
        """
        try:
            os.makedirs(os.path.dirname(filepath) or os.curdir, exist_ok=True)
            write_whole(filepath, obj)
        except OSError as error:
            raise not_written(filepath, error) from error

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Writes text, as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)


def not_written(path: str | Path, error: OSError) -> StorageError:
    """The error that says what could not be written, why, and that nothing is lost."""
    return StorageError(
        f"'{path}' cannot be written ({error.strerror or error}); what was saved before is"
        ' unchanged. Make room there or choose another work directory, and go on with --resume'
    )


def install() -> None:
    """Makes mmengine write local files with :class:`WholeFileBackend`.

    Called when slope_mm is imported. May be called again.
    """
    register_backend('local', WholeFileBackend, force=True, prefixes='')


def latest_checkpoint(work_dir: str, folder: str | None = None) -> str | None:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names, if it is complete.

    A pointer that is missing, cut off, or names a file that is not there or not complete is passed
    over with a warning, in favour of the newest checkpoint that can be read and resumed.

    Args:
        work_dir: Where ``last_checkpoint`` is.
        folder: Where checkpoints are. Defaults to ``work_dir``.

    Returns:
        A path, or None if there is nothing to resume from.
    """
    pointer = Path(work_dir) / POINTER
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else None
    if named is not None and ('://' in named or _has_an_end(named)):
        return named
    place = Path(work_dir if folder is None else folder)
    found = next(_resumable(place), None) if '://' not in str(place) else None
    if named is not None:
        print_log(
            f'{pointer} names {named!r}, which is no complete checkpoint; '
            + (f'{found} is the newest that is' if found else f'nor is there another in {place}'),
            logger='current',
            level=logging.WARNING,
        )
    return found


def _has_an_end(path: str) -> bool:
    # Some strategies write a folder. A zip archive's table of contents comes last: no reading of
    # hundreds of megabytes.
    return os.path.isdir(path) or (os.path.isfile(path) and zipfile.is_zipfile(path))


def _resumable(folder: Path) -> Iterator[str]:
    """Checkpoints that hold all that a run needs to go on, the newest first."""
    paths = [path for path in folder.glob('*.pth') if path.is_file()]
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            content = load_checkpoint_file(path)
        except CheckpointError:
            continue
        # The best checkpoint of a run, and a published one, have no optimizer.
        if isinstance(content, dict) and {'meta', 'state_dict', 'optimizer'} <= content.keys():
            yield str(path)
