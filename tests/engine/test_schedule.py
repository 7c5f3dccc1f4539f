"""Schedules: lambda's warm-up, when masks move, freeze and ramp; as functions and in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import Tensor

import slope_mm
from slope_mm import ConfigError, SlopeScheduleHook, compressed_layers
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.hooks.schedule import ramped_pattern
from slope_mm.engine.schedules import (
    decay_factor,
    point_in_training,
    ramped_density,
    ramped_kept,
    warmup_factor,
)
from slope_mm.ops import parse_pattern

lengths = st.integers(1, 10_000)
patterns = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


# --- functions -----------------------------------------------------------------------------------


@given(length=lengths, data=st.data())
def test_warmup_rises_in_equal_parts_to_one(length: int, data: st.DataObject) -> None:
    iteration = data.draw(st.integers(0, length - 1))
    factor = warmup_factor(iteration, length=length)
    assert factor == pytest.approx((iteration + 1) / length)
    assert warmup_factor(iteration + 1, length=length) >= factor > 0
    assert warmup_factor(length - 1 + iteration, length=length) == 1


def test_no_warmup_is_full_strength_at_once() -> None:
    assert warmup_factor(0, length=0) == 1


@given(length=lengths, data=st.data())
def test_decay_falls_in_equal_parts_to_zero(length: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, length - 1))
    factors = [decay_factor(i, begin=begin, length=length) for i in (begin, begin + 1, length)]
    assert factors == pytest.approx([1, 1 - 1 / (length - begin), 0])
    assert decay_factor(max(begin - 1, 0), begin=begin, length=length) == 1


def test_without_decay_lambda_stays() -> None:
    assert decay_factor(9, begin=None, length=10) == 1


@given(pattern=patterns, length=lengths, data=st.data())
def test_ramp_of_groups(pattern: tuple[int, int], length: int, data: st.DataObject) -> None:
    n, m = pattern
    iteration = data.draw(st.integers(0, 2 * length))
    kept = ramped_kept(iteration, length=length, n=n, m=m)
    assert ramped_kept(0, length=length, n=n, m=m) == m
    assert ramped_kept(iteration + 1, length=length, n=n, m=m) <= kept
    # The target is reached at the end, and neither earlier nor later.
    assert (kept == n) == (iteration >= length)
    assert n <= kept <= m
    if iteration < length:
        # Never more than one step ahead of the straight line from m to n.
        assert 0 <= kept - (m - (m - n) * iteration / length) < 1


@given(density=st.floats(0.01, 0.99), length=lengths, data=st.data())
def test_ramp_of_densities(density: float, length: int, data: st.DataObject) -> None:
    iteration = data.draw(st.integers(0, 2 * length))
    now = ramped_density(iteration, length=length, density=density)
    assert ramped_density(0, length=length, density=density) == 1
    assert ramped_density(iteration + 1, length=length, density=density) <= now
    assert density <= now <= 1
    assert now == density or iteration < length


def test_ramped_patterns() -> None:
    two_of_eight = parse_pattern('2:8')
    names = [ramped_pattern(two_of_eight, i, 6) for i in range(8)]
    assert [p and p.name for p in names] == [None, '7:8', '6:8', '5:8', '4:8', '3:8', '2:8', '2:8']
    half = parse_pattern('unstructured:0.5')
    assert ramped_pattern(half, 0, 4) is None
    assert ramped_pattern(half, 2, 4).density == 0.75
    assert ramped_pattern(half, 4, 4) == half


@given(iterations=st.integers(0, 10**6), length=lengths)
def test_points_given_in_iterations(iterations: int, length: int) -> None:
    assert point_in_training(iterations, length, 'here') == iterations


@given(share=st.floats(0, 1), length=lengths)
def test_points_given_as_shares(share: float, length: int) -> None:
    point = point_in_training(share, length, 'here')
    assert abs(point - share * length) <= 0.5


def test_no_point() -> None:
    assert point_in_training(None, 10, 'here') is None


@pytest.mark.parametrize('value', [-1, -0.1, 1.5, float('nan'), True, '3'])
def test_what_is_no_point_in_training(value: Any) -> None:
    with pytest.raises(ConfigError, match='freeze_at=.* is no point in training'):
        point_in_training(value, 10, 'freeze_at')


# --- runs ----------------------------------------------------------------------------------------

ITERATIONS = 8


class Diary(tiny.Observer):
    """Notes masks, the masks that W asks for, lambda's factor and L_reg of every iteration."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.wanted: list[dict[str, Tensor | None]] = []
        self.held: list[bool] = []
        self.compressed: list[dict[str, Tensor]] = []
        self.factors: list[float] = []
        self.unweighted: list[float] = []
        self.added: list[float] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        layers = compressed_layers(runner.model)
        self.masks.append(tiny.masks_of(runner.model))
        self.wanted.append({name: layer.live_mask() for name, layer in layers.items()})
        self.held.append(all(layer.slope_mask is not None for layer in layers.values()))
        self.compressed.append({n: x.compressed_weight().detach() for n, x in layers.items()})
        self.factors.append(runner.optim_wrapper.regularizer.scale)
        self.unweighted.append(float(slope_mm.regularization(runner.model)))

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self.added.append(float(runner.optim_wrapper.last_regularization))


class Shaker(Hook):
    """Stands for a training that moves weights far: adds noise that depends on the iteration."""

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        noise = torch.Generator().manual_seed(runner.iter)
        with torch.no_grad():
            for layer in compressed_layers(runner.model).values():
                scale = 0.2 * layer.weight.std()
                layer.weight += scale * torch.randn(layer.weight.shape, generator=noise)


def train(config: Config, *hooks: Hook) -> tiny.Run:
    return tiny.train(config, Shaker(), *hooks)


def config_with(work_dir: Path, ema: bool = False, **schedule: Any) -> Config:
    """Eight iterations of the toy; a checkpoint after five."""
    config = tiny.toy_config(work_dir, train_cfg__max_iters=ITERATIONS)
    config.default_hooks.checkpoint.interval = 5
    config.custom_hooks = [dict(type='slope_mm.SlopeScheduleHook', **schedule)]
    if ema:
        config.custom_hooks.append(
            dict(type='EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.3)
        )
    return config


def diary(work_dir: Path, **schedule: Any) -> Diary:
    notes = Diary()
    train(config_with(work_dir, **schedule), notes)
    return notes


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return not tiny.differing(a, b)


def kept_in_groups(mask: Tensor) -> set[int]:
    """How many of four consecutive input channels are kept (the toy has no transposed layer)."""
    return set(mask.unflatten(1, (-1, 4)).sum(2).unique().tolist())


@pytest.mark.parametrize('warmup', [4, 0.5])
def test_warmup_scales_what_is_added(tmp_path: Path, warmup: float) -> None:
    notes = diary(tmp_path, warmup=warmup)
    assert notes.factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    lambda_ = 2.0
    wanted = [lambda_ * f * u for f, u in zip(notes.factors, notes.unweighted, strict=True)]
    assert notes.added == pytest.approx(wanted, rel=1e-4)


def test_decay_scales_what_is_added(tmp_path: Path) -> None:
    notes = diary(tmp_path, warmup=2, decay_from=0.5)
    assert notes.factors == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    wanted = [2.0 * f * u for f, u in zip(notes.factors, notes.unweighted, strict=True)]
    assert notes.added == pytest.approx(wanted, rel=1e-4)


def test_masks_follow_the_weights_by_default(tmp_path: Path) -> None:
    notes = diary(tmp_path)
    assert not any(notes.held)
    assert not same(notes.masks[0], notes.masks[1])
    assert not same(notes.masks[-2], notes.masks[-1])


def test_masks_move_at_intervals(tmp_path: Path) -> None:
    notes = diary(tmp_path, mask_interval=3)
    assert all(notes.held)
    for i in range(ITERATIONS):
        assert same(notes.masks[i], notes.masks[i - i % 3])
        assert same(notes.masks[i], notes.wanted[i]) == (i % 3 == 0)


def test_frozen_masks_stay(tmp_path: Path) -> None:
    notes = diary(tmp_path, freeze_at=3)
    assert notes.held == [False] * 3 + [True] * 5
    assert not same(notes.masks[1], notes.masks[2])
    assert same(notes.masks[3], notes.wanted[3])
    for i in range(4, ITERATIONS):
        assert same(notes.masks[i], notes.masks[3])
        assert not same(notes.masks[i], notes.wanted[i]), 'the weights no longer asked for others'


def test_freezing_keeps_the_mask_of_the_last_interval(tmp_path: Path) -> None:
    notes = diary(tmp_path, mask_interval=4, freeze_at=6)
    assert same(notes.masks[-1], notes.masks[4])


def test_ramp_reaches_the_pattern_exactly(tmp_path: Path) -> None:
    notes = diary(tmp_path, ramp_until=6)
    for i, kept in enumerate([None, None, None, 3, 3, 3, 2, 2]):
        assert bool(notes.masks[i]) == (kept is not None)
        for name, mask in notes.masks[i].items():
            assert kept_in_groups(mask) == {kept}
            assert not notes.compressed[i][name][~mask].any()
    assert all((w != 0).float().mean() > 0.6 for w in notes.compressed[0].values()), 'dense'


@pytest.mark.parametrize('until', [1.0, ITERATIONS, 20])
def test_a_ramp_to_the_end_trains_with_the_pattern_at_last(tmp_path: Path, until: float) -> None:
    notes = diary(tmp_path, ramp_until=until, freeze_at=1.0)
    assert {kept_in_groups(mask).pop() for mask in notes.masks[-2].values()} == {3}
    assert {kept_in_groups(mask).pop() for mask in notes.masks[-1].values()} == {2}


class Evaluation(tiny.Observer):
    """Evaluates after every iteration: calls what the validation loop calls first."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        runner.call_hook('before_val_epoch')
        self.masks.append(tiny.masks_of(runner.model))


def test_evaluations_within_a_ramp_are_of_what_checkpoints_load_as(tmp_path: Path) -> None:
    """A checkpoint knows no ramp: denser models would be chosen as the best and never saved."""
    evaluated, plain = Evaluation(), Diary()
    train(config_with(tmp_path / 'a', ramp_until=6), evaluated, notes := Diary())
    for masks in evaluated.masks:
        assert {kept for mask in masks.values() for kept in kept_in_groups(mask)} == {2}
    # And training goes on with the ramp as if nobody had looked.
    train(config_with(tmp_path / 'b', ramp_until=6), plain)
    for seen, expected in zip(notes.masks, plain.masks, strict=True):
        assert same(seen, expected)


@pytest.mark.parametrize('freeze_at', [6, 7, None])
def test_ramp_reaches_the_pattern_also_between_intervals(
    tmp_path: Path, freeze_at: int | None
) -> None:
    notes = diary(tmp_path, ramp_until=6, mask_interval=4, freeze_at=freeze_at)
    for i in (6, 7):
        assert {kept for mask in notes.masks[i].values() for kept in kept_in_groups(mask)} == {2}
        assert notes.masks[i].keys() == {'first', 'twice', 'mix'}


@pytest.mark.parametrize(
    'schedule', [dict(freeze_at=3), dict(mask_interval=4), dict(ramp_until=7)], ids=str
)
@pytest.mark.parametrize('ema', [False, True], ids=['', 'ema'])
def test_resume_continues_the_schedule(tmp_path: Path, schedule: dict[str, int], ema: bool) -> None:
    """From the checkpoint after five iterations: the same masks and weights as without a break."""
    whole = Diary()
    run = train(config_with(tmp_path / 'whole', ema, **schedule), whole)
    config = config_with(tmp_path / 'resumed', ema, **schedule)
    config.resume, config.load_from = True, str(tmp_path / 'whole' / 'iter_5.pth')
    rest = Diary()
    resumed = train(config, rest)
    assert len(rest.masks) == 3
    for a, b in zip(whole.masks[5:], rest.masks, strict=True):
        assert same(a, b)
    assert same(tiny.state_of(run.model), tiny.state_of(resumed.model))


def test_frozen_masks_are_saved_state(tmp_path: Path) -> None:
    run = train(config_with(tmp_path, freeze_at=3))
    state = load_checkpoint_file(run.checkpoint)['state_dict']
    for name, mask in tiny.masks_of(run.model).items():
        assert torch.equal(state[f'{name}.slope_mask'], mask)
    # A live mask is a function of W and is not saved.
    run = train(config_with(tmp_path / 'live'))
    state = load_checkpoint_file(run.checkpoint)['state_dict']
    assert not [key for key in state if key.endswith('slope_mask')]


def test_averaged_models_have_the_frozen_masks_too(tmp_path: Path) -> None:
    run = train(config_with(tmp_path, ema=True, freeze_at=3))
    averaged = next(h for h in run.runner.hooks if hasattr(h, 'ema_model')).ema_model.module
    assert same(tiny.masks_of(averaged), tiny.masks_of(run.model))
    checkpoint = load_checkpoint_file(run.checkpoint)
    for name, layer in compressed_layers(run.model).items():
        # The Runner saves the average as the model and the model as the average.
        saved = checkpoint['state_dict'][f'{name}.weight']
        assert torch.equal(saved, averaged.get_submodule(name).weight)
        assert not torch.equal(saved, layer.weight)
        for part, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
            assert torch.equal(checkpoint[part][f'{prefix}{name}.slope_mask'], layer.mask)


def test_training_from_a_frozen_checkpoint_moves_masks_again(tmp_path: Path) -> None:
    frozen = train(config_with(tmp_path / 'frozen', freeze_at=3))
    config = config_with(tmp_path / 'again', ema=True)
    config.load_from = str(frozen.checkpoint)
    notes = Diary()
    run = train(config, notes)
    assert not any(notes.held)
    assert same(notes.masks[0], notes.wanted[0])
    assert not same(notes.masks[0], tiny.masks_of(frozen.model))
    assert not [key for key in run.model.state_dict() if key.endswith('slope_mask')]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('schedule', 'message'),
    [
        (dict(mask_interval=0), 'mask_interval=0 is not a number of iterations >= 1'),
        (dict(mask_interval=1.5), 'mask_interval=1.5'),
        (dict(warmup=-1), 'warmup=-1 is no point in training'),
        (dict(freeze_at=1.5), 'freeze_at=1.5 is no point in training'),
        (dict(ramp_until='end'), "ramp_until='end' is no point in training"),
    ],
    ids=str,
)
def test_bad_schedules(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlopeScheduleHook(**schedule)


def test_freezing_before_the_ramp_ends(tmp_path: Path) -> None:
    config = config_with(tmp_path, freeze_at=0.25, ramp_until=0.5)
    with pytest.raises(ConfigError, match='at iteration 2, before the ramp ends at 4; freeze'):
        train(config)
