"""The monitor: what it writes is what a checkpoint says, and its audit finds a broken layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from numpy.typing import NDArray

from slope_mm import ConfigError, SlopeError, SlopeMonitorHook, compressed_layers
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.ops import weight_codes

MakeConfig = Callable[..., Config]
Array = NDArray[Any]

FIGURES = ['cosine', 'sqnr_db', 'clipped', 'zeros']


class Weights(tiny.Observer):
    """Keeps the weights and the added regularizer of every iteration."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Array]] = []
        self.added: list[float] = []

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        layers = compressed_layers(runner.model).items()
        self.weights.append({n: layer.weight.detach().numpy().copy() for n, layer in layers})
        self.added.append(float(runner.optim_wrapper.last_regularization))


@pytest.fixture(scope='module')
def notes() -> Weights:
    return Weights()


@pytest.fixture(scope='module')
def run(
    tiny_config: MakeConfig,
    dense_run: tiny.Run,
    notes: Weights,
    tmp_path_factory: pytest.TempPathFactory,
) -> tiny.Run:
    """Two epochs of two iterations, evaluated after each, with pictures."""
    config = tiny_config(
        tmp_path_factory.mktemp('monitored'), epochs=2, load_from=str(dense_run.checkpoint)
    )
    config.train_cfg.val_interval = 1
    config.log_processor.window_size = 3
    config.custom_hooks[-1].picture = True
    return tiny.train(config, notes)


# --- an independent computation ------------------------------------------------------------------


def mask_of(weight: Array, name: str) -> Array:
    """2:4 along the input channels: axis 1, or 0 in the one transposed convolution."""
    axis = 0 if name.endswith('upsample') else 1
    groups = np.moveaxis(weight, axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, 4)
    order = np.argsort(-np.abs(groups), axis=-1, kind='stable')
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[..., :2], True, axis=-1)
    return np.moveaxis(kept.reshape(np.moveaxis(weight, axis, -1).shape), -1, axis)


def figures_of(state: dict[str, Any], name: str, spec: str) -> dict[str, float]:
    """Cosine, SQNR, clipped share and zero codes of a layer out of a checkpoint, in numpy."""
    pattern, bits, _ = spec.split(' ')
    weight = state[f'{name}.weight'].numpy()
    step = state[f'{name}.slope_step'].numpy()
    kept = np.ones(weight.shape, bool) if pattern == 'dense' else mask_of(weight, name)
    low, high = -(2 ** (int(bits[1:]) - 1)), 2 ** (int(bits[1:]) - 1) - 1
    scaled = weight / step
    compressed = np.clip(np.round(scaled), low, high) * step * kept
    w, c = weight.ravel().astype(float), compressed.ravel().astype(float)
    return {
        'cosine': float(w @ c / np.sqrt((w @ w) * (c @ c))),
        'sqnr_db': float(10 * np.log10((w @ w) / ((w - c) @ (w - c)))),
        'clipped': float(((scaled <= low) | (scaled >= high))[kept].mean()),
        'zeros': float((compressed[kept] == 0).mean()),
    }


@pytest.fixture(scope='module')
def last_state(run: tiny.Run) -> dict[str, Any]:
    return load_checkpoint_file(run.checkpoint)['state_dict']


def test_csv_holds_a_row_per_layer_and_evaluation(run: tiny.Run) -> None:
    rows = tiny.read_layers(run.config.work_dir)
    names = list(compressed_layers(run.model))
    assert list(rows[0]) == ['epoch', 'iter', 'name', 'spec', *FIGURES, 'flip_rate']
    assert [(int(row['iter']), row['name']) for row in rows] == [
        (iteration, name) for iteration in (2, 4) for name in names
    ]
    assert [int(row['epoch']) for row in rows] == [1] * len(names) + [2] * len(names)
    specs = {row['name']: row['spec'] for row in rows}
    assert specs['backbone.conv1'] == 'dense W8 A8'
    assert specs['roi_head.mask_head.upsample'] == '2:4 W4 A4'


def test_csv_equals_a_computation_from_the_checkpoint(
    run: tiny.Run, last_state: dict[str, Any]
) -> None:
    last = [row for row in tiny.read_layers(run.config.work_dir) if row['iter'] == '4']
    for row in last:
        wanted = figures_of(last_state, row['name'], row['spec'])
        found = {key: float(row[key]) for key in FIGURES}
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6), row['name']


def test_log_equals_a_computation_from_the_checkpoint(
    run: tiny.Run, last_state: dict[str, Any]
) -> None:
    rows = tiny.read_layers(run.config.work_dir)
    last = [row for row in rows if row['iter'] == '4']
    figures = [figures_of(last_state, row['name'], row['spec']) for row in last]
    logged = tiny.read_losses(run.config.work_dir)[-1]
    assert logged['iter'] == 4
    for key in FIGURES:
        mean = float(np.mean([figure[key] for figure in figures]))
        name = 'slope_cosine_mean' if key == 'cosine' else f'slope_{key}'
        assert logged[name] == pytest.approx(mean, rel=1e-4), key
    worst = min(figure['cosine'] for figure in figures)
    assert logged['slope_cosine_worst'] == pytest.approx(worst, rel=1e-5)
    text = tiny.read_log(run.config.work_dir)
    assert f'slope_cosine_mean: {logged["slope_cosine_mean"]:.4f}' in text


def test_flips_since_the_last_look(run: tiny.Run, notes: Weights) -> None:
    sparse = {
        row['name']
        for row in tiny.read_layers(run.config.work_dir)
        if row['spec'].startswith('2:4')
    }
    logged = tiny.read_losses(run.config.work_dir)
    assert 'slope_flip_rate' not in logged[0]
    for i in range(1, 4):
        before, after = notes.weights[i - 1], notes.weights[i]
        flips = {n: (mask_of(before[n], n) != mask_of(after[n], n)).mean() for n in sparse}
        assert logged[i]['slope_flip_rate'] == pytest.approx(np.mean(list(flips.values())))
    assert max(row['slope_flip_rate'] for row in logged[1:]) > 0
    for row in tiny.read_layers(run.config.work_dir)[-len(notes.weights[0]) :]:
        wanted = '' if row['name'] not in sparse else pytest.approx(flips[row['name']])
        assert (float(row['flip_rate']) if row['flip_rate'] else '') == wanted


def test_the_regularizer_is_averaged_like_every_other_loss(run: tiny.Run, notes: Weights) -> None:
    """Over the log's window of three iterations."""
    logged = [row['slope_loss'] for row in tiny.read_losses(run.config.work_dir)]
    means = [np.mean(notes.added[max(0, i - 2) : i + 1]) for i in range(4)]
    assert logged == pytest.approx(means)


def test_pictures(run: tiny.Run) -> None:
    work_dir = Path(run.config.work_dir)
    for name in ('slope_layers.png', 'slope_layers_iter_2.png', 'slope_layers_iter_4.png'):
        picture = cv2.imread(str(work_dir / name))
        height, width = picture.shape[:2]
        assert 1000 <= width <= 3000
        assert 600 <= height <= 3000
        # Bars of two colours on white, not an empty frame.
        coloured = np.ptp(picture.astype(int), axis=2) > 60
        assert 0.05 < coloured.mean() < 0.9
    assert not list(work_dir.glob('*.part'))


def test_it_looks_in_the_first_iteration_and_then_at_intervals(tmp_path: Path) -> None:
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=6)
    config.custom_hooks = [dict(type='slope_mm.SlopeMonitorHook', interval=3)]
    tiny.train(config)
    seen = [row['slope_sqnr_db'] for row in tiny.read_losses(tmp_path)]
    looks = [i + 1 for i in range(6) if i == 0 or seen[i] != seen[i - 1]]
    assert looks == [1, 3, 6]


def test_another_run_in_the_folder_has_a_table_of_its_own(tmp_path: Path) -> None:
    """A run that starts anew keeps the old table under another name."""
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=2)
    old = tmp_path / 'slope_layers.csv'
    old.write_text('of the run before\n')
    hook = SlopeMonitorHook(picture=False)
    runner = tiny.Runner.from_cfg(config)
    hook.after_val_epoch(runner)
    hook.after_val_epoch(runner)
    assert not old.read_text().startswith('of the run before')
    (kept,) = tmp_path.glob('slope_layers_before_*.csv')
    assert kept.read_text() == 'of the run before\n'


@pytest.mark.parametrize('interval', [0, 2.5, None])
def test_bad_interval(interval: Any) -> None:
    with pytest.raises(ConfigError, match='is not a number of iterations >= 1'):
        SlopeMonitorHook(interval=interval)


# --- the audit -----------------------------------------------------------------------------------


class Breaker(Hook):
    """Breaks a layer of the toy before the audit sees it."""

    priority = 'VERY_HIGH'

    def __init__(self, how: str) -> None:
        self.how = how

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        layer = runner.model.twice
        if self.how == 'mask':
            layer.slope_mask = torch.ones_like(layer.weight, dtype=torch.bool)
        if self.how == 'codes':
            layer._codes = weight_codes('lsq', 8)
            layer.slope_step.data.div_(16)


def audited(work_dir: Path, how: str, **options: Any) -> str:
    config = tiny.toy_config(work_dir, train_cfg__max_iters=1, **options)
    config.custom_hooks = [dict(type='slope_mm.SlopeMonitorHook')]
    runner = tiny.Runner.from_cfg(config)
    runner.register_hook(Breaker(how))
    runner.train()
    return tiny.read_log(work_dir)


def test_audit_of_a_sound_model_says_nothing(tmp_path: Path) -> None:
    assert 'did not run' not in audited(tmp_path, 'nothing')


def test_audit_finds_a_broken_pattern(tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match=r"layer 'twice' keeps [34] of 4 .* pattern is 2:4"):
        audited(tmp_path, 'mask')


@pytest.mark.parametrize('at', [6, 7])
def test_audit_knows_that_a_held_mask_follows_a_ramp_later(at: int, tmp_path: Path) -> None:
    hooks = [
        dict(type='slope_mm.SlopeScheduleHook', ramp_until=1.0, mask_interval=4),
        dict(type='slope_mm.SlopeMonitorHook', picture=False),
    ]
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=12, custom_hooks=hooks)
    config.model.recipe = dict(weight=dict(sparsity='2:8', bits=4))
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    whole = tiny.state_of(tiny.train(config).model)
    config.update(load_from=str(tmp_path / f'iter_{at}.pth'), resume=True)
    assert not tiny.differing(tiny.state_of(tiny.train(config).model), whole)


def test_audit_finds_too_many_codes(tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match=r"layer 'twice' uses \d+ codes, more than 4 bits"):
        audited(tmp_path, 'codes')


def test_audit_names_layers_that_did_not_run(tmp_path: Path) -> None:
    log = audited(tmp_path, 'nothing', model__spare=True)
    assert '1 compressed layers did not run in the first iteration: spare.' in log
