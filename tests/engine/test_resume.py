"""A run that was killed, or stopped while a model average was kept, goes on as if nothing was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from torch import Tensor

from slope_mm import compressed_layers
from slope_mm.engine.checkpoint import load_checkpoint_file

MakeConfig = Callable[..., Config]


# --- killed --------------------------------------------------------------------------------------


def kill_after_first_checkpoint(config_file: Path, work_dir: Path) -> None:
    """Runs tools/train.py and kills it in its second epoch."""
    with (work_dir.parent / 'output.txt').open('w') as output:
        process = subprocess.Popen(
            [sys.executable, tiny.ROOT / 'tools' / 'train.py', config_file],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        # Written when the checkpoint is complete.
        while not (work_dir / 'last_checkpoint').exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (work_dir.parent / 'output.txt').read_text()


def test_a_run_without_a_seed_in_its_config_resumes_with_the_one_it_drew(tmp_path: Path) -> None:
    """mmengine builds the data loader before it reads the checkpoint."""

    def config(work_dir: Path, **options: Any) -> Config:
        made = tiny.toy_config(work_dir, **options)
        made.train_cfg = dict(by_epoch=True, max_epochs=3)
        made.train_dataloader.sampler.shuffle = True
        made.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
        made.log_processor = dict(by_epoch=True, window_size=1)
        made.custom_hooks = [dict(type='slope_mm.EpochSeedHook')]
        made.pop('randomness')
        return made

    whole = tiny.train(config(tmp_path / 'whole'))
    wanted = tiny.read_losses(tmp_path / 'whole')
    half = tmp_path / 'whole' / 'epoch_1.pth'
    again = tiny.train(config(tmp_path / 'again', resume=True, load_from=str(half)))
    assert again.runner.seed == whole.runner.seed
    later = [row['loss'] for row in wanted if row['epoch'] > 1]
    assert [row['loss'] for row in tiny.read_losses(tmp_path / 'again')] == later
    workers = again.runner.train_dataloader.worker_init_fn
    assert workers.keywords['seed'] == again.runner.seed


def test_killed_and_resumed_equals_uninterrupted(
    tiny_config: MakeConfig, dense_run: tiny.Run, tmp_path: Path
) -> None:
    def two_epochs(work_dir: Path) -> Config:
        config = tiny_config(
            work_dir, epochs=2, validate=False, load_from=str(dense_run.checkpoint)
        )
        # Eight iterations an epoch: time enough to be killed in.
        config.train_dataloader.batch_size = 1
        return config

    whole = two_epochs(tmp_path / 'whole')
    run = tiny.train(whole)
    wanted = tiny.read_losses(whole.work_dir)
    assert [row['epoch'] for row in wanted] == [1] * 8 + [2] * 8

    killed = tmp_path / 'killed'
    file = tiny.dump(two_epochs(killed), tmp_path / 'config.py')
    kill_after_first_checkpoint(file, killed)
    assert not (killed / 'epoch_2.pth').exists()
    first = tiny.read_losses(killed)
    assert len(first) < 16
    assert first == wanted[: len(first)]

    assert tiny.call_tool('train', file, '--resume') == 0
    second = tiny.read_losses(killed)
    assert [row['epoch'] for row in second] == [2] * 8
    # The first look of a process has nothing to compare masks with.
    for row in (wanted[8], second[0]):
        row.pop('slope_flip_rate', None)
    assert second == wanted[8:]
    a, b = (load_checkpoint_file(w / 'epoch_2.pth') for w in (killed, Path(whole.work_dir)))
    assert not tiny.differing(a['state_dict'], b['state_dict'])
    assert not tiny.differing(a['state_dict'], tiny.state_of(run.model))


# --- with a model average ------------------------------------------------------------------------


class StoppedError(Exception):
    pass


class StopAfterFirstEpoch(tiny.Observer):
    def before_train_epoch(self, runner: Any) -> None:
        if runner.epoch == 1:
            raise StoppedError


class Evaluated(tiny.Observer):
    """What the validation at the end computes with, and what comes out."""

    def before_val_epoch(self, runner: Any) -> None:
        self.state = tiny.state_of(runner.model)
        layers = compressed_layers(runner.model).items()
        self.compressed = {n: layer.compressed_weight().detach().clone() for n, layer in layers}

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.outputs = [sample.pred_instances for sample in outputs]

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.metrics = metrics


@pytest.fixture(scope='module')
def with_ema(tiny_config: MakeConfig, dense_run: tiny.Run) -> Callable[..., Config]:
    def make(work_dir: Path, **options: Any) -> Config:
        config = tiny_config(work_dir, epochs=2, load_from=str(dense_run.checkpoint), **options)
        # As mmdet's own configs have it, but for a momentum that shows in four iterations.
        ema = dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.2, gamma=1)
        config.custom_hooks.append(dict(ema, update_buffers=True, priority=49))
        return config

    return make


@pytest.fixture(scope='module')
def whole(
    with_ema: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tiny.Run, Evaluated]:
    seen = Evaluated()
    return tiny.train(with_ema(tmp_path_factory.mktemp('ema')), seen), seen


def averaged_state(run: tiny.Run) -> dict[str, Tensor]:
    hook = next(h for h in run.runner.hooks if hasattr(h, 'ema_model'))
    return tiny.state_of(hook.ema_model.module)


def test_evaluation_uses_the_average(whole: tuple[tiny.Run, Evaluated]) -> None:
    run, seen = whole
    assert not tiny.differing(seen.state, averaged_state(run))
    moved = tiny.differing(seen.state, tiny.state_of(run.model))
    # Weights, steps and statistics all lag behind; signs and specs are the same.
    assert {key.rsplit('.', 1)[1] for key in moved} >= {
        'weight',
        'slope_step',
        'slope_act_step',
        'running_mean',
    }
    assert not [key for key in moved if key.endswith(('slope_act_signed', 'slope_layer'))]


def test_masks_and_codes_of_the_average_hold(whole: tuple[tiny.Run, Evaluated]) -> None:
    """Averaging compressed weights would mix masks; they are made from the averaged W."""
    run, seen = whole
    for name, layer in compressed_layers(run.model).items():
        weight, compressed = seen.state[f'{name}.weight'], seen.compressed[name]
        if layer.slope_spec.pattern is not None:
            groups = weight.movedim(layer.input_axis, -1).unflatten(-1, (-1, 4)).abs()
            smaller = groups < groups.sort(dim=-1).values[..., 2:3]
            kept = compressed.movedim(layer.input_axis, -1).unflatten(-1, (-1, 4)) != 0
            assert not (kept & smaller).any(), name
            assert int(kept.sum(-1).max()) == 2, name
        step = seen.state[f'{name}.slope_step']
        assert len((compressed / step).round().unique()) <= 2**layer.slope_spec.bits
        assert torch.allclose((compressed / step).round() * step, compressed, rtol=1e-5)


def test_the_saved_average_is_what_was_evaluated(whole: tuple[tiny.Run, Evaluated]) -> None:
    """Steps included: a fresh detector predicts to the last bit what the validation predicted."""
    run, seen = whole
    saved = load_checkpoint_file(run.checkpoint)['state_dict']
    assert not tiny.differing(saved, seen.state)
    fresh = tiny.build(run.config).eval()
    load_checkpoint(fresh, str(run.checkpoint), map_location='cpu')
    with torch.no_grad():
        outputs = fresh.val_step(tiny.first_batch(run.config, 4, split='val'))
    assert sum(len(instances) for instances in seen.outputs) > 0
    for sample, wanted in zip(outputs, seen.outputs, strict=True):
        assert torch.equal(sample.pred_instances.bboxes, wanted.bboxes)
        assert torch.equal(sample.pred_instances.scores, wanted.scores)
        assert np.array_equal(sample.pred_instances.masks, wanted.masks)


def test_resumed_average_equals_uninterrupted(
    whole: tuple[tiny.Run, Evaluated], with_ema: Callable[..., Config], tmp_path: Path
) -> None:
    run, seen = whole
    with pytest.raises(StoppedError):
        tiny.train(with_ema(tmp_path), StopAfterFirstEpoch())
    config = with_ema(tmp_path)
    config.resume, config.load_from = True, str(tmp_path / 'epoch_1.pth')
    again = Evaluated()
    resumed = tiny.train(config, again)
    assert not tiny.differing(tiny.state_of(resumed.model), tiny.state_of(run.model))
    assert not tiny.differing(averaged_state(resumed), averaged_state(run))
    assert not tiny.differing(again.state, seen.state)
    assert again.metrics == seen.metrics
    log = tiny.read_log(tmp_path)
    for noise in ('missing keys', 'unexpected key', 'do not match', 'size mismatch'):
        assert noise not in log
