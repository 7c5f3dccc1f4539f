"""An exported detector on disk: ONNX files, and the JSON that ties them together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slope_mm.errors import ExportError

FORMAT_VERSION = 1
INDEX = 'detector.json'


@dataclass(frozen=True)
class PartFiles:
    """One part of an exported detector.

    Attributes:
        name: The part (see :mod:`slope_mm.export.parts`).
        portable: File name of the graph for any runtime.
        cpu: File name of the graph for ONNX Runtime's CPU provider.
        input: Name of the graphs' input.
        structure: How the flat outputs are nested.
        sha256: Checksums of the files by name.
        at_once: How many inputs a thread is to hand to the CPU provider's graph at a time; None for
            all of them.
    """

    name: str
    portable: str
    cpu: str
    input: str
    structure: Any
    sha256: dict[str, str]
    at_once: int | None = None


@dataclass(frozen=True)
class ExportIndex:
    """What :data:`INDEX` says.

    Attributes:
        parts: The parts.
        arch: The stock detector's type.
        dataset_meta: Class names and the like.
        facts: Recipe, counts, and what the gate measured.
    """

    parts: list[PartFiles]
    arch: str
    dataset_meta: dict[str, Any]
    facts: dict[str, Any]

    def part(self, name: str) -> PartFiles | None:
        """The part of a name, or None."""
        return next((part for part in self.parts if part.name == name), None)


def write_index(folder: Path, index: ExportIndex) -> None:
    """Writes :data:`INDEX`."""
    content = {'format': 'slope_mm.onnx', 'version': FORMAT_VERSION, **asdict(index)}
    (folder / INDEX).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def read_index(folder: str | os.PathLike[str], check: bool = True) -> ExportIndex:
    """Reads an exported detector's index.

    Args:
        folder: What ``tools/export.py onnx`` wrote.
        check: Compare the files' checksums.

    Raises:
        ExportError: If it is missing, damaged, or of another version.
    """
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        version = content.pop('version')
        if content.pop('format') != 'slope_mm.onnx' or version != FORMAT_VERSION:
            raise ExportError(
                f'{path} is of version {version}; this slope_mm reads {FORMAT_VERSION}: export the'
                ' checkpoint again'
            )
        parts = [PartFiles(**part) for part in content.pop('parts')]
        index = ExportIndex(parts, **content)
    except FileNotFoundError:
        raise ExportError(
            f"there is no '{path}'; give a folder that tools/export.py onnx wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f'{path} cannot be read ({error}); export the checkpoint again') from None
    if check:
        for part in index.parts:
            for name, wanted in part.sha256.items():
                _check_file(Path(folder) / name, wanted)
    return index


def _check_file(path: Path, wanted: str) -> None:
    if path.name != os.path.basename(path.name) or not path.is_file():
        raise ExportError(f"'{path}' is missing; export the checkpoint again")
    if checksum(path) != wanted:
        raise ExportError(f"'{path}' is damaged or of another export; export the checkpoint again")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that takes a folder's place when everything went well.

    Args:
        folder: Where the export shall be: nothing, an empty folder, or an earlier export.

    Raises:
        ExportError: If something else is there, or it cannot be written.
    """
    target = Path(folder)
    if target.exists() and not _replaceable(target):
        raise ExportError(
            f"'{target}' exists and is no earlier export; choose an empty or a new folder"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    except OSError as error:
        raise ExportError(f"'{target}' cannot be written: {error.strerror}") from None
    try:
        yield stage
        stage.chmod(0o755)
        old = Path(tempfile.mkdtemp(prefix=f'.{target.name}.old.', dir=target.parent))
        if target.exists():
            target.replace(old / 'export')
        stage.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"'{target}' cannot be written: {error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / INDEX).is_file() or not any(target.iterdir()))
