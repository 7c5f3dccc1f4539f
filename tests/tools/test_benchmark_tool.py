"""``tools/benchmark.py`` as a process, on the smallest detector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch


def test_a_training_step_is_timed_and_saved(tmp_path: Path) -> None:
    out = tmp_path / 'train.json'
    command = [sys.executable, 'tools/benchmark.py', 'train', '--arms', 'stock', 'W4A4']
    command += ['--config', 'configs/mask_rcnn_r18_shapes_fp32.py', '--size', '64', '64']
    command += ['--rounds', '2', '--batch', '1', '--out', str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    content = json.loads(out.read_text())
    assert content['machine']['threads'] == 1
    stock, ours = content['rows']
    assert (stock['arm'], stock['ratio'], ours['arm']) == ('stock', 1.0, 'W4A4')
    assert ours['ms'] > 0
    assert '| W4A4' in ran.stdout


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--rounds', '0'], '0 is not at least 1'),
        (['--size', '0', '64'], '0 is not at least 1'),
        (['--device', 'cuda'], 'torch finds no GPU here'),
    ],
)
def test_settings_that_cannot_be_are_one_line(options: list[str], said: str) -> None:
    if said.endswith('here') and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    command = [sys.executable, 'tools/benchmark.py', 'train', *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    assert ran.returncode == 2
    assert said in ran.stderr and 'Traceback' not in ran.stderr


def test_an_unknown_arm_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, 'tools/benchmark.py', 'train', '--arms', 'W5']
    command += ['--config', 'configs/mask_rcnn_r18_shapes_fp32.py', '--out', str(tmp_path / 'x')]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    assert ran.returncode != 0
    assert "arm 'W5' is unknown" in ran.stderr and 'Traceback' not in ran.stderr
