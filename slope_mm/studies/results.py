"""``results.json``: what all trials of a study reached, and what did not run and why."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slope_mm.errors import DataError
from slope_mm.studies.study import Study

RESULTS = 'results.json'


@dataclass
class Results:
    """Content of ``results.json``.

    Attributes:
        study: Name of the study file.
        rows: One dict a finished trial: ``task``, ``arm``, ``seed``, metrics, ``config_hash``,
            ``versions``, ``machine``, ``wall_s``, the arm's treatment, cosine, size, curves.
            ``start_digest`` names the weights of its start; older rows lack it, and it is None
            where it is unknown.
        starts: The same of the dense models that arms start from; ``start_digest`` is that of
            their own weights.
        failed: ``task``, ``arm``, ``seed``, ``error``, ``log`` of trials that failed.
        skipped: ``task`` and ``reason`` of tasks that cannot run here.
        interplay: Rows of :class:`~slope_mm.analysis.interplay.LayerErrors` with their ``task``.
    """

    study: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    interplay: list[dict[str, Any]] = field(default_factory=list)

    def by_seed(self, task: str, arm: str, key: str) -> dict[int, float]:
        """A figure of an arm, by seed; seeds without it are left out."""
        return {
            row['seed']: row[key]
            for row in self.rows
            if row['task'] == task and row['arm'] == arm and row.get(key) is not None
        }

    def training_loss(self, task: str, arm: str) -> dict[int, float]:
        """An arm's training loss at the last look, without the regularizer, by seed.

        Seeds whose last loss was no number are left out.
        """
        return {
            row['seed']: row['curves']['loss'][-1]
            for row in self.of(task, arm)
            # A loss that was no number is stored as None.
            if (row.get('curves', {}).get('loss') or [None])[-1] is not None
        }

    def of(self, task: str, arm: str) -> list[dict[str, Any]]:
        """The rows of an arm on a task."""
        return [row for row in self.rows if row['task'] == task and row['arm'] == arm]

    def write(self, folder: Path) -> None:
        """Writes ``results.json``, one row a line, as a whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = [f'"study": {json.dumps(self.study)}']
        for key in ('rows', 'starts', 'failed', 'skipped', 'interplay'):
            value = getattr(self, key)
            lines = ',\n'.join('    ' + json.dumps(item, allow_nan=False) for item in value)
            parts.append(f'"{key}": [' + (f'\n{lines}\n  ]' if lines else ']'))
        write_text(folder / RESULTS, '{\n  ' + ',\n  '.join(parts) + '\n}\n')


def read_results(folder: Path, study: Study) -> Results:
    """Reads ``results.json``.

    Raises:
        DataError: If it is missing, unreadable, or another study's.
    """
    path = folder / RESULTS
    if not path.exists():
        raise DataError(f"there is no '{path}' yet; run the study without --report-only first")
    try:
        content = json.loads(path.read_text())
        results = Results(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); remove it and run the study") from None
    if results.study != study.name:
        raise DataError(
            f"'{path}' holds the results of study {results.study!r}, not of {study.name!r}; choose"
            ' another --out'
        )
    return results


def finished_rows(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by the hash of what they depend on."""
    return {str(row['config_hash']): dict(row) for row in results}


def copy_of(path: Path) -> Path:
    """Copies a file to a name beside it that is free: ``results.json.bak``, ``.bak2``, …"""
    for number in itertools.count(1):
        place = path.with_name(f'{path.name}.bak{"" if number == 1 else number}')
        if not place.exists():
            break
    write_text(place, path.read_text(encoding='utf-8'))
    return place


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    partial = path.with_name(path.name + '.part')
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)
