"""Commands, last words, progress and times of a study's processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

import slope_mm
from slope_mm.errors import ConfigError, SlopeError
from slope_mm.studies.measure import can_weigh, curves_of, measured, metrics_of
from slope_mm.studies.processes import (
    Interrupted,
    Launcher,
    Processes,
    last_error,
    progress_of,
)
from slope_mm.studies.progress import Estimator, ProgressLine, clock, remaining_seconds
from slope_mm.studies.runner import locked

CONFIG, CHECKPOINT, FOLDER = Path('c.py'), Path('m.pth'), Path('out')


def words(command: list[str]) -> list[str]:
    """A command without the paths of interpreter and tools."""
    return [Path(word).name if '/' in word else word for word in command]


def test_commands_are_those_of_the_tools() -> None:
    python = Path(sys.executable).name
    alone = Launcher()
    train = words(alone.train(CONFIG, FOLDER, 'label'))
    assert train == [python, 'train.py', 'c.py', '--work-dir', 'out', '--resume']
    test = words(alone.test(CONFIG, CHECKPOINT, FOLDER, 'label'))
    assert test == [python, 'test.py', 'c.py', 'm.pth', '--work-dir', 'out']
    ranks = Launcher('pytorch', processes=4)
    train = words(ranks.train(CONFIG, FOLDER, 'label'))
    assert train == ['bash', 'dist_train.sh', 'c.py', '4', '--work-dir', 'out', '--resume']
    test = words(ranks.test(CONFIG, CHECKPOINT, FOLDER, 'label'))
    assert test == ['bash', 'dist_test.sh', 'c.py', 'm.pth', '4', '--work-dir', 'out']


def test_slurm_asks_for_the_ranks_of_a_trial(tmp_path: Path) -> None:
    """With an srun that says what it was asked."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    launcher = Launcher('slurm', processes=2, partition='gpu')
    environment = launcher.environment(0, 1)
    environment['PATH'] = f'{tmp_path}:{environment["PATH"]}'
    for command, tool in (
        (launcher.train(CONFIG, FOLDER, 'a label'), 'train.py c.py --work-dir out'),
        (launcher.test(CONFIG, CHECKPOINT, FOLDER, 'a label'), 'test.py c.py m.pth'),
    ):
        log = tmp_path / 'log'
        Processes().run(command, environment, log)
        asked = log.read_text()
        assert '-p gpu --job-name=a label' in asked
        assert '--ntasks=2' in asked
        assert tool in asked and '--launcher slurm' in asked


def test_launchers_that_lack_something_are_refused() -> None:
    with pytest.raises(ConfigError, match='--launcher'):
        Launcher('none', processes=2)
    with pytest.raises(ConfigError, match='--partition'):
        Launcher('slurm')


def test_threads_do_not_depend_on_the_machine_nor_on_the_jobs() -> None:
    one, many = Launcher().environment(0, 1), Launcher().environment(3, 4)
    for environment in (one, many):
        assert (environment['OMP_NUM_THREADS'], environment['MKL_NUM_THREADS']) == ('1', '1')
    assert one['PORT'] != many['PORT']
    assert one['MASTER_PORT'] == one['PORT'] and many['MASTER_PORT'] == many['PORT']


@pytest.mark.parametrize(
    ('given', 'slots'),
    [
        (None, ['0', '1', '2']),
        ('4,5,7', ['4', '5', '7']),
        ('GPU-a,GPU-b,GPU-c', ['GPU-a', 'GPU-b', 'GPU-c']),
    ],
)
def test_each_trial_has_a_gpu_of_those_that_were_given(
    given: str | None, slots: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('torch.cuda.device_count', lambda: 3)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if given is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
    found = [Launcher().environment(slot, 4)['CUDA_VISIBLE_DEVICES'] for slot in range(4)]
    assert found == [*slots, slots[0]]
    assert Launcher().environment(0, 1).get('CUDA_VISIBLE_DEVICES') == given


def test_the_last_error_line_is_found_among_what_comes_after() -> None:
    traceback = ['Traceback', '  File "x"', 'torch.OutOfMemoryError: CUDA out of memory', 'bye']
    assert last_error(traceback, 1) == 'torch.OutOfMemoryError: CUDA out of memory'
    assert last_error(['error: there is no config', ''], 2) == 'there is no config'
    ranks = ['ValueError: a rank', 'torch.distributed.elastic.errors.ChildFailedError:', '=====']
    assert last_error(ranks, 1) == 'ValueError: a rank'
    assert last_error(['whatever'], 3) == 'exit code 3: whatever'
    assert last_error(['whatever'], -signal.SIGKILL) == 'killed by SIGKILL'


def test_a_process_that_fails_says_why_and_leaves_its_log(tmp_path: Path) -> None:
    log = tmp_path / 'log'
    command = [sys.executable, '-c', 'print("before"); raise KeyError("reason")']
    with pytest.raises(SlopeError, match="KeyError: 'reason'"):
        Processes().run(command, dict(os.environ), log)
    assert 'before' in log.read_text()


def test_a_process_runs_where_its_study_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and checkpoints that a study names relatively are those that it was checked with."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, '-c', 'import os; print(os.getcwd())']
    Processes().run(command, dict(os.environ), tmp_path / 'log')
    assert (tmp_path / 'log').read_text().splitlines()[-1] == str(tmp_path.resolve())


def test_stopping_ends_what_a_process_started_too(tmp_path: Path) -> None:
    processes = Processes()
    child = 'import os, time; print("child", os.getpid(), flush=True); time.sleep(60)'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    seen: list[int] = []

    def watch(line: str) -> None:
        seen.append(int(line.split()[1]))
        threading.Thread(target=processes.stop).start()

    with pytest.raises(Interrupted):
        command = [sys.executable, '-c', parent]
        processes.run(command, dict(os.environ), tmp_path / 'log', watch)
    deadline = time.monotonic() + 10
    while Path(f'/proc/{seen[0]}').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
    with pytest.raises(Interrupted):
        processes.run(command, dict(os.environ), tmp_path / 'log')


def test_progress_is_read_from_mmengines_log() -> None:
    line = 'INFO - Epoch(train)  [2][ 50/125]  lr: 1e-3  eta: 0:00:19  loss: 1.0'
    assert progress_of(line, 4) == pytest.approx((1 + 50 / 125) / 4)
    assert progress_of('INFO - Iter(train) [ 30/120]  lr: 1', 120) == 0.25
    assert progress_of('INFO - Epoch(val) [2][50/125]', 4) is None


@dataclass(frozen=True)
class Fake:
    """As much of a trial as an estimate needs."""

    task: Any
    arm: Any


def fake(arm: str, task: str = 'shapes') -> Any:
    return Fake(task=_named(task), arm=_named(arm))


def _named(name: str) -> Any:
    return type('Named', (SimpleNamespace,), {'__hash__': lambda self: hash(self.name)})(name=name)


def test_the_estimate_takes_what_it_knows_best() -> None:
    estimator = Estimator()
    slope, naive, nuclei = fake('slope'), fake('naive'), fake('slope', 'nuclei')
    assert remaining_seconds(estimator, [slope], {}, 1) is None
    # Half done after 50 seconds: 50 to go, and 100 for the other.
    assert remaining_seconds(estimator, [naive], {slope: (50.0, 0.5)}, 1) == 150
    estimator.add(slope, 100.0)
    estimator.add(slope, 120.0)
    assert estimator.expected(slope) == 110
    assert estimator.expected(naive) == 110
    estimator.add(naive, 50.0)
    assert estimator.expected(naive) == 50
    assert estimator.expected(nuclei) == 90
    assert remaining_seconds(estimator, [naive, naive, slope, slope], {}, 2) == 160


def test_clocks() -> None:
    times = (None, 42.4, 600, 7500)
    assert [clock(t) for t in times] == ['?', '42 s', '10 min', '2 h 05 min']


def test_a_log_gets_lines_now_and_then_and_a_terminal_one_that_changes() -> None:
    log = io.StringIO()
    line = ProgressLine(log)
    line.update('first')
    line.update('second')
    line.message('stays')
    assert log.getvalue() == 'first\nstays\n'

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    line = ProgressLine(terminal)
    for text in ('a long line', 'short'):
        line.update(text)
    line.message('stays')
    # What a terminal shows of each line is what comes after the last return.
    assert terminal.getvalue().splitlines()[-1].split('\r')[-1] == 'stays'
    assert 'short' in terminal.getvalue()


def test_curves_of_a_resumed_run_are_one_curve(tmp_path: Path) -> None:
    for name, iterations in (('20260101_000000', (1, 2, 3)), ('20260101_000100', (3, 4))):
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        rows = [
            {'loss': i, 'iter': i, 'step': i, 'slope_cosine_mean': 0.9 + i / 100, **extra}
            for i in iterations
            for extra in [{'slope_flip_rate': 0.5} if i > 1 else {}]
        ]
        text = '\n'.join(json.dumps(row) for row in [*rows, {'coco/bbox_mAP': 0.5, 'step': 9}])
        # The first one was killed in the middle of a line.
        cut = '\n{"loss": 3, "it' if iterations[0] == 1 else ''
        (folder / 'scalars.json').write_text(text + cut)
    curves = curves_of(tmp_path)
    assert curves['iter'] == [1, 2, 3, 4]
    assert curves['cosine'] == pytest.approx([0.91, 0.92, 0.93, 0.94])
    assert curves['flip_rate'] == [None, 0.5, 0.5, 0.5]
    assert 'sqnr_db' not in curves


def test_metrics_are_the_newest_evaluations(tmp_path: Path) -> None:
    wanted = {'box_mAP': 'coco/bbox_mAP'}
    with pytest.raises(SlopeError, match='no metrics'):
        metrics_of(tmp_path, wanted)
    for name, value in (('20260101_000000', 0.1), ('20260101_000100', 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f'{name}.json').write_text(json.dumps({'coco/bbox_mAP': value}))
    assert metrics_of(tmp_path, wanted) == {'box_mAP': 0.2}
    with pytest.raises(SlopeError, match="no 'top1'"):
        metrics_of(tmp_path, {'top1': 'top1'})


def test_nothing_detected_is_a_map_of_zero(tmp_path: Path) -> None:
    """COCO's metric leaves no figure at all then; a collapsed arm must not drop out of means."""
    (tmp_path / '20260101_000000').mkdir()
    file = tmp_path / '20260101_000000' / 'metrics.json'
    file.write_text(json.dumps({'data_time': 0.1, 'time': 0.2}))
    wanted = {'box_mAP': 'coco/bbox_mAP', 'mask_mAP': 'coco/segm_mAP'}
    assert metrics_of(tmp_path, wanted) == {'box_mAP': 0.0, 'mask_mAP': 0.0}


def test_the_size_is_the_packed_files_length_as_soon_as_there_is_one(
    slope_run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial: Any = SimpleNamespace(
        config=slope_run.config, weights=slope_run.checkpoint, folder=tmp_path
    )
    monkeypatch.delattr('slope_mm.save_packed', raising=False)
    row = {**measured(trial), 'regularizer': 'cosine'}
    assert row['bytes_from'] == 'calculated'
    assert row['bytes'] == slope_mm.report(slope_run.model).stored_bytes
    assert not can_weigh(trial, row)

    def save_packed(model: Any, path: Path) -> None:
        path.write_bytes(bytes(12345))

    monkeypatch.setattr('slope_mm.save_packed', save_packed, raising=False)
    assert can_weigh(trial, row)
    row.update(measured(trial))
    assert (row['bytes'], row['bytes_from']) == (12345, 'file')
    assert not can_weigh(trial, row)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match='another process'),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path) as lock:
        # A training that outlives the study keeps the folder.
        child = subprocess.Popen(['sleep', '60'], pass_fds=[lock])
    with pytest.raises(ConfigError), locked(tmp_path):
        pass
    # Who waits can be stopped.
    asked = []

    def stop() -> None:
        asked.append(1)
        raise Interrupted

    with pytest.raises(Interrupted), locked(tmp_path, stop):
        pass
    assert asked
    child.kill()
    child.wait()
    with locked(tmp_path):
        pass
