"""A few kills of a real training; ``SLOPE_KILLS=20`` makes that many."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

RUNS = int(os.environ.get('SLOPE_KILLS', '3'))


def test_a_killed_run_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own: it forks its runs."""
    tool = tiny.ROOT / 'tools' / 'reliability.py'
    options = ['--runs', RUNS, '--epochs', 2, '--images', 4, '--work-dir', tmp_path]
    done = subprocess.run(
        [sys.executable, tool, 'kills', *map(str, options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(next(tmp_path.glob('*/kills.json')).read_text())
    assert tally['kills'] == RUNS
    assert tally['finished'] >= 1
    assert tally['lines'] >= 4


def test_what_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a line that differs, one that is missing, a weight that differs."""
    monkeypatch.syspath_prepend(tiny.ROOT / 'tools')
    tool = importlib.import_module('reliability')

    def run(name: str, rows: list[dict], weight: float = 1.0) -> Path:
        folder = tmp_path / name
        (folder / '1' / 'vis_data').mkdir(parents=True)
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        (folder / '1' / 'vis_data' / 'scalars.json').write_text(lines + '{"loss": 0.5, "st')
        content = {'state_dict': {'w': torch.tensor([weight])}, 'optimizer': {'state': {}}}
        torch.save(content, folder / 'epoch_1.pth')
        return folder

    rows = [{'loss': 1.0, 'step': 1, 'time': 1.0}, {'loss': 0.5, 'step': 2, 'time': 1.0}]
    whole = run('whole', rows)
    tally = tool.Tally()
    tool.compare(run('same', [{**row, 'time': 2.0} for row in rows]), whole, tally)
    assert (tally.lines, tally.finished) == (2, 1)
    other = {**rows[1], 'loss': 0.5000001}
    for name, folder, message in (
        ('line', run('line', [rows[0], other]), 'iteration 2'),
        ('again', run('again', [*rows, other]), 'iteration 2'),
        ('missing', run('missing', rows[:1]), r'never came to iterations \[2\]'),
        ('weight', run('weight', rows, 1.0000001), 'differs .* in its state_dict'),
    ):
        with pytest.raises(tool.LostError, match=message):
            tool.compare(folder, whole, tool.Tally())
        assert name == folder.name
