"""tools/ablate.py with real trainings: a killed study goes on, a failed arm is listed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from mmengine.config import Config

from slope_mm.studies.digests import weights_digest

ARMS = """
_w4 = dict(weight=dict(sparsity='2:4', bits=4))
arms = [
    dict(name='slope', recipe=_w4, regularizer=dict(type='cosine', weight=1.0)),
    dict(name='broken', recipe=_w4, options={'train_dataloader.batch_size': -3}),
]
tables = [dict(arms=['*'], against='slope')]
figures = [
    dict(kind='size', name='size', series=dict(SLOPE=['slope'])),
    dict(kind='curves', name='curves', series=dict(SLOPE=['slope'])),
]
interplay = dict(sparsity=['2:4'], bits=[4])
"""


@pytest.fixture(scope='module')
def study(
    dense_run: tiny.Run,
    tiny_config: Callable[..., Config],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A study of two arms of two epochs, from the start of the other tests."""
    folder = tmp_path_factory.mktemp('study')
    config = tiny_config(folder, 'mask_rcnn_r18_shapes_fp32', epochs=2)
    file = tiny.dump(config, folder / 'fp32.py')
    (folder / 'tiny_study.py').write_text(
        f'tasks = dict(shapes=dict(config={str(file)!r},'
        f' start=dict(checkpoint={str(dense_run.checkpoint)!r}),'
        " metrics=dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP')),"
        " absent=dict(config='configs/mask_rcnn_r18_shapes_fp32.py',"
        " options={'train_dataloader.dataset.data_root': 'nowhere/'},"
        " metrics=dict(box_mAP='coco/bbox_mAP')))\n"
        f'{ARMS}'
    )
    return folder / 'tiny_study.py'


@pytest.fixture
def ablate(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the tool in this process: exit code, output, errors."""
    monkeypatch.chdir(tiny.ROOT)
    # The tool takes SIGTERM over.
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: Any) -> tuple[int, str, str]:
        try:
            code = tiny.call_tool('ablate', study, '--work-dir', study.parent, *arguments)
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def kill_after_an_epoch(study: Path) -> str:
    """Starts the study in a process of its own and ends it after the first checkpoint."""
    command = [sys.executable, 'tools/ablate.py', str(study), '--work-dir', str(study.parent)]
    environment = {**os.environ, 'PYTHONPATH': str(tiny.ROOT)}
    process = subprocess.Popen(
        [*command, '--arms', 'slope'],
        cwd=tiny.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(study.parent.glob('runs/*/last_checkpoint')):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    return output


def test_a_study_from_its_interruption_to_its_report(
    study: Path, ablate: Callable[..., tuple[int, str, str]], dense_run: tiny.Run
) -> None:
    out = study.parent / 'tiny_study'
    # Killed after the first of two epochs.
    assert 'interrupted; run it again' in kill_after_an_epoch(study)
    (folder,) = study.parent.glob('runs/*')
    assert (folder / 'epoch_1.pth').exists() and not (folder / 'result.json').exists()
    assert json.loads((out / 'results.json').read_text())['rows'] == []

    # Goes on; the arm that fails does not stop the other one.
    code, output, _ = ablate('--jobs', 1)
    assert code == 1
    log = (folder / 'train.log').read_text()
    assert log.count('Epoch(train) [1][2/2]') == log.count('Epoch(train) [2][2/2]') == 1
    assert 'resumed epoch: 1' in log
    content = json.loads((out / 'results.json').read_text())
    (row,) = content['rows']
    assert (row['task'], row['arm'], row['seed']) == ('shapes', 'slope', 0)
    assert (row['sparsity'], row['bits'], row['lambda']) == ('2:4', 4, 1.0)
    assert 0.8 < row['cosine'] < 1 and row['bytes'] * 5 < row['dense_bytes']
    assert row['curves']['iter'] == [1, 2, 3, 4] and len(row['curves']['cosine']) == 4
    # The interrupted training began from these weights.
    assert row['start_digest'] == weights_digest(dense_run.checkpoint)
    metrics = json.loads(sorted(folder.glob('test/*/*.json'))[-1].read_text().splitlines()[-1])
    assert (row['box_mAP'], row['mask_mAP']) == (metrics['coco/bbox_mAP'], metrics['coco/segm_mAP'])
    (failed,) = content['failed']
    assert failed['arm'] == 'broken' and 'batch_size=-3' in failed['error']
    assert 'broken / seed 0: FAILED: ValueError: batch_size' in output
    (skipped,) = content['skipped']
    assert skipped['task'] == 'absent' and 'nowhere' in skipped['reason']
    assert content['interplay']
    # What is left of the training is weights.
    assert {path.name for path in folder.glob('*.pth')} == {'model.pth'}

    # A finished arm is not run again, and the same report comes out.
    text = (out / 'results.md').read_text()
    before = (folder / 'train.log').stat().st_mtime_ns, (folder / 'result.json').stat().st_mtime_ns
    # What another machine found on data that this one has not.
    elsewhere = {**content['interplay'][0], 'task': 'absent'}
    content['interplay'].append(elsewhere)
    content['failed'].append({**failed, 'arm': 'renamed since'})
    (out / 'results.json').write_text(json.dumps(content))
    code, output, _ = ablate('--arms', 'slope')
    assert '1 of 1 trials are done already' in output
    content = json.loads((out / 'results.json').read_text())
    assert content['interplay'].count(elsewhere) == 1
    assert [f['arm'] for f in content['failed']] == ['broken']
    content['interplay'].remove(elsewhere)
    (out / 'results.json').write_text(json.dumps(content))
    # The other arm was not asked for, so its failure still stands.
    assert code == 1
    after = (folder / 'train.log').stat().st_mtime_ns, (folder / 'result.json').stat().st_mtime_ns
    assert after == before

    # As if the folder of all runs, with the start in it, had moved meanwhile.
    (config,) = (p / 'config.py' for p in study.parent.glob('runs/*') if p != folder)
    right = config.read_text()
    config.write_text(right.replace(str(dense_run.checkpoint), '/gone/start.pth'))
    code, output, _ = ablate('--arms', 'broken')
    assert code == 1 and 'batch_size=-3' in output and '/gone' not in output
    assert config.read_text() == right

    # Redrawn from the results alone.
    for path in out.glob('*.[mp]*'):
        path.unlink()
    code, output, _ = ablate('--report-only')
    assert code == 0
    drawn = (out / 'results.md').read_text()
    assert drawn == text
    assert {path.name for path in out.glob('*.png')} == {'size_shapes.png', 'curves_shapes.png'}


def test_the_plan_runs_nothing(ablate: Callable[..., tuple[int, str, str]], study: Path) -> None:
    before = sorted(study.parent.rglob('*'))
    code, output, _ = ablate('--plan')
    assert code == 0
    assert 'slope' in output and 'broken' in output and 'skipped: ' in output
    assert sorted(study.parent.rglob('*')) == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--arms', 'slop'], "'slop' is no arm; nearest: 'slope'"),
        (['--tasks', 'shape'], "no 'shape'; nearest: 'shapes'"),
        (['--seeds', '99'], 'nothing that is chosen has seeds'),
        (['--seeds', '0', '99'], 'nothing that is chosen has seeds [99]'),
        (['--jobs', '0'], '--jobs 0'),
        (['--threads', '0'], '--threads 0 is no number >= 1'),
        (['--report-only', '--arms', 'slope'], '--report-only draws all of results.json'),
        (['--processes', '2'], '--processes needs --launcher'),
        (['--quick'], 'no short form'),
        (['--report-only', '--out', 'nowhere'], 'run the study without --report-only'),
    ],
)
def test_a_command_line_that_asks_for_nothing_possible_is_refused(
    ablate: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    code, _, errors = ablate(*arguments)
    assert code == 2
    assert message in errors and len(errors.splitlines()) == 1
