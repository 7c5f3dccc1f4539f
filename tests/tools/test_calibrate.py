"""tools/calibrate.py: a checkpoint that evaluates, and that fine-tuning starts from unchanged."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from torch import Tensor

import slope_mm
from slope_mm.engine import launch


def call(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the tool."""
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        code = tiny.call_tool('calibrate', *arguments)
    return code, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope='module')
def config(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Config]:
    return lambda: tiny_config(tmp_path_factory.mktemp('calibrate'))


@pytest.fixture(scope='module')
def done(
    config: Callable[[], Config], dense_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """Config file, checkpoint and output of a compensated run."""
    folder = tmp_path_factory.mktemp('oneshot')
    file, out = tiny.dump(config(), folder / 'tiny.py'), folder / 'new' / 'start.pth'
    code, printed, errors = call(
        file, dense_run.checkpoint, out, '--compensate', '--batches', 1, '--evaluate'
    )
    assert code == 0, errors
    return file, out, printed


class Start(tiny.Observer):
    """What the model is when training begins."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self.weights:
            layers = slope_mm.compressed_layers(runner.model)
            self.weights = {n: la.compressed_weight().detach().clone() for n, la in layers.items()}
            self.masks, self.steps = tiny.masks_of(runner.model), tiny.steps_of(runner.model)


def test_fine_tuning_starts_from_exactly_what_was_found(
    config: Callable[[], Config], done: tuple[Path, Path, str]
) -> None:
    _, out, _ = done
    model = launch.build_model(config())
    launch.load_weights(model, str(out))
    changed, start = config(), Start()
    changed.load_from = str(out)
    changed.val_dataloader = changed.val_cfg = changed.val_evaluator = None
    tiny.train(changed, start)
    layers = slope_mm.compressed_layers(model)
    assert start.weights.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(start.weights[name], layer.compressed_weight()), name
        assert torch.isfinite(layer.weight).all()
        assert layer.calibrated, name
    assert tiny.differing(start.masks, tiny.masks_of(model)) == []
    # The calibration hook and the step search leave alone what is calibrated already.
    assert tiny.differing(start.steps, tiny.steps_of(model)) == []


def test_the_table_says_what_it_did(done: tuple[Path, Path, str], dense_run: tiny.Run) -> None:
    file, out, printed = done
    model = launch.build_model(launch.read_config(str(file)))
    launch.load_weights(model, str(out))
    dense = torch.load(dense_run.checkpoint, weights_only=False)['state_dict']
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if ' W' in line}
    layers = slope_mm.compressed_layers(model)
    assert rows.keys() >= layers.keys()
    for name, layer in layers.items():
        decibels = float(slope_mm.ops.sqnr_db(dense[f'{name}.weight'], layer.compressed_weight()))
        assert float(rows[name][4]) == pytest.approx(decibels, abs=0.01), name
    plain, result = (
        float(re.findall(rf'\b{word} (\d+\.?\d*(?:e-?\d+)?)', printed)[-1])
        for word in ('plain', 'result')
    )
    assert result < plain


def test_the_checkpoint_evaluates_as_the_tool_says(
    done: tuple[Path, Path, str], tmp_path: Path
) -> None:
    file, out, printed = done
    assert tiny.call_tool('test', file, out, '--work-dir', tmp_path) == 0
    metrics = json.loads(max(tmp_path.glob('*/*.json')).read_text())
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert f'{name}: {metrics[name]:.4f}' in printed


def test_without_compensation_weights_stay_and_steps_are_those_of_least_error(
    config: Callable[[], Config], dense_run: tiny.Run, tmp_path: Path
) -> None:
    file, out = tiny.dump(config(), tmp_path / 'tiny.py'), tmp_path / 'plain.pth'
    assert call(file, dense_run.checkpoint, out, '--batches', 1)[0] == 0
    dense = torch.load(dense_run.checkpoint, weights_only=False)['state_dict']
    model = launch.build_model(config())
    launch.load_weights(model, str(out))
    for name, layer in slope_mm.compressed_layers(model).items():
        assert torch.equal(layer.weight, dense[f'{name}.weight'])
        error = (layer.weight - layer.compressed_weight()).square().sum()
        for factor in (0.9, 1.1):
            with torch.no_grad():
                layer.slope_step.mul_(factor)
                assert (layer.weight - layer.compressed_weight()).square().sum() > error
                layer.slope_step.div_(factor)


def test_mistakes_end_in_one_line_and_write_nothing(
    config: Callable[[], Config], dense_run: tiny.Run, slope_run: tiny.Run, tmp_path: Path
) -> None:
    file, out = tiny.dump(config(), tmp_path / 'tiny.py'), tmp_path / 'new' / 'out.pth'
    for arguments, words in (
        ([file, slope_run.checkpoint, out], 'compressed model already'),
        ([file, dense_run.checkpoint, out, '--batches', 0], '--batches 0 is less than 1'),
        ([file, dense_run.checkpoint, out, '--memory', -1], '--memory -1 is less than 1'),
        ([dense_run.file, dense_run.checkpoint, out], 'the config has no recipe'),
        ([file, dense_run.checkpoint, file], '--force'),
    ):
        code, _, errors = call(*arguments)
        assert code == 2 and words in errors
        assert errors.splitlines()[-1].startswith('error: ')
        assert not out.parent.exists()
