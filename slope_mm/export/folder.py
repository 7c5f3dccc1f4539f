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
    if Path(folder).is_file():
        raise ExportError(
            f"'{os.fspath(folder)}' is a file; give the folder that tools/export.py onnx wrote"
        )
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
            for name in dict.fromkeys((part.portable, part.cpu, *part.sha256)):
                _check_file(Path(folder), name, part.sha256.get(name))
    return index


def _check_file(folder: Path, name: str, wanted: str | None) -> None:
    path = folder / name
    if name != os.path.basename(name) or wanted is None:
        raise ExportError(
            f"'{folder / INDEX}' names '{name}', which is no file of an export; export the"
            ' checkpoint again'
        )
    if not path.is_file():
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
    target = check_target(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    except OSError as error:
        raise ExportError(f"'{target}' cannot be written: {error.strerror}") from None
    try:
        yield stage
        stage.chmod(0o755)
        # Once more: writing and judging may have taken hours.
        check_target(target)
        _exchange(stage, target)
    except OSError as error:
        raise ExportError(f"'{target}' cannot be written: {error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _exchange(stage: Path, target: Path) -> None:
    """Puts a folder in another's place; where that fails, the other one is back there."""
    if not target.exists():
        stage.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f'.{target.name}.old.', dir=target.parent))
    try:
        target.replace(old / 'export')
        try:
            stage.replace(target)
        except OSError:
            (old / 'export').replace(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Looks whether an export may be written to a folder, and gives its path without links.

    Raises:
        ExportError: If something is there that is no earlier export, or that lies beside one.
    """
    target = Path(folder).resolve()
    advice = 'choose an empty or a new folder'
    if Path.cwd().is_relative_to(target):
        raise ExportError(f"'{target}' is the folder you are in, or holds it; {advice}")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ExportError(f"'{target}' exists and is no folder; {advice}")
    there = {entry.name for entry in target.iterdir()}
    if there and INDEX not in there:
        raise ExportError(f"'{target}' exists and is no earlier export; {advice}")
    if there:
        parts = read_index(target, check=False).parts
        others = there - {INDEX} - {name for part in parts for name in part.sha256}
        if others:
            raise ExportError(
                f"'{target}' holds '{min(others)}' beside an earlier export, which would be lost;"
                f' move it, or {advice}'
            )
    return target
