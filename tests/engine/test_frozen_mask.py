"""A frozen mask stays to the element: 1,000 steps, resume, EMA, bake, packed file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from torch import Tensor

import slope_mm
from slope_mm.engine.checkpoint import load_checkpoint_file

FREEZE, HALF, STEPS = 10, 500, 1000


class Watch(tiny.Observer):
    """The mask with which training froze, and whether any later step saw another one."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.steps = 0

    def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
        if runner.iter < FREEZE:
            return
        masks = tiny.masks_of(runner.model)
        self.masks = self.masks or masks
        assert not tiny.differing(masks, self.masks)
        if runner.iter % 50 == 0:
            layers = slope_mm.compressed_layers(runner.model)
            for name, mask in masks.items():
                assert not layers[name].compressed_weight().detach()[~mask].any(), name
        self.steps += 1


def config_of(work_dir: Path, **options: Any) -> Config:
    config = tiny.toy_config(work_dir, **options)
    # A loader's end costs mmengine two seconds.
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    config.default_hooks.logger.interval = STEPS
    config.default_hooks.checkpoint.interval = HALF
    config.optim_wrapper.optimizer = dict(type='Adam', lr=0.005)
    config.custom_hooks = [
        dict(type='slope_mm.SlopeScheduleHook', freeze_at=FREEZE),
        dict(type='EMAHook', momentum=0.05),
    ]
    return config


@pytest.fixture(scope='module')
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, Watch, tiny.Run]:
    """A run to the middle, and one that goes on from there to the end."""
    root = tmp_path_factory.mktemp('frozen')
    first, second = Watch(), Watch()
    middle = tiny.train(config_of(root / 'a', train_cfg__max_iters=HALF), first).checkpoint
    options = dict(train_cfg__max_iters=STEPS, load_from=str(middle), resume=True)
    run = tiny.train(config_of(root / 'b', **options), second)
    return first, second, run


def zeros_stay(found: Any, mask: Tensor) -> bool:
    """Whether an array is zero wherever the mask is; a kept weight may be zero, too."""
    return not np.asarray(found)[~mask.numpy()].any()


def test_through_a_thousand_steps_and_a_resume(halves: tuple[Watch, Watch, tiny.Run]) -> None:
    first, second, run = halves
    assert (first.steps, second.steps) == (HALF - FREEZE, STEPS - HALF)
    assert set(first.masks) == {'first', 'twice', 'mix'}
    assert not tiny.differing(first.masks, second.masks)
    live = {n: m.live_mask() for n, m in slope_mm.compressed_layers(run.model).items()}
    moved = sum(int((live[name] != mask).sum()) for name, mask in first.masks.items())
    assert moved > 20, 'no mask would have changed, so this proves nothing'


def saved_states(run: tiny.Run) -> dict[str, dict[str, Tensor]]:
    """Of the last checkpoint: averaged weights in ``state_dict``, those of training beside it."""
    content = load_checkpoint_file(run.checkpoint)
    trained = content['ema_state_dict'].items()
    prefix = 'module.'
    return {
        'averaged': content['state_dict'],
        'trained': {k.removeprefix(prefix): v for k, v in trained if k.startswith(prefix)},
    }


def test_through_the_average_and_its_checkpoint(halves: tuple[Watch, Watch, tiny.Run]) -> None:
    masks, run = halves[0].masks, halves[2]
    states = saved_states(run)
    assert not tiny.differing(states['trained'], tiny.state_of(run.model))
    averaged = next(h for h in run.runner.hooks if hasattr(h, 'ema_model')).ema_model.module
    for name, mask in masks.items():
        assert all(torch.equal(state[f'{name}.slope_mask'], mask) for state in states.values())
        assert tiny.differing(*({'w': state[f'{name}.weight']} for state in states.values()))
        layer = averaged.get_submodule(name)
        assert torch.equal(layer.mask, mask)
        assert zeros_stay(layer.compressed_weight().detach(), mask)


def test_through_bake_and_the_packed_file(
    halves: tuple[Watch, Watch, tiny.Run], tmp_path: Path
) -> None:
    masks, run = halves[0].masks, halves[2]
    for source, state in saved_states(run).items():
        model = copy.deepcopy(run.model)
        model.load_state_dict(state)
        baked = slope_mm.bake(model).state_dict()
        path = tmp_path / f'{source}.slope'
        slope_mm.save_packed(model, path)
        packed = slope_mm.read_packed(path)
        loaded = slope_mm.load_packed(path, tiny.ToyNet())
        for name, mask in masks.items():
            wanted = baked[f'{name}.weight'].numpy()
            assert zeros_stay(wanted, mask)
            assert wanted.any()
            assert np.array_equal(packed[f'{name}.weight'], wanted)
            layer = loaded.get_submodule(name)
            assert torch.equal(layer.mask, mask)
            assert np.array_equal(layer.compressed_weight().detach().numpy(), wanted)
