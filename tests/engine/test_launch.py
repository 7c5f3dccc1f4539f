"""What tools/train.py says before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from slope_mm.engine import launch
from slope_mm.engine.hooks import SlopeCheckpointHook


@pytest.mark.parametrize(
    ('options', 'warned'),
    [
        ({}, True),
        ({'load_from': 'trained.pth'}, False),
        ({'load_from': 'epoch_1.pth', 'resume': True}, False),
        ({'model__init_cfg': dict(type='Pretrained', checkpoint='trained.pth')}, False),
        ({'model': dict(_delete_=True, type='ToyNet')}, False),
    ],
    ids=['no start', 'load_from', 'resumed', 'init_cfg', 'dense'],
)
def test_a_compressed_model_without_a_start_is_warned_about(
    options: dict[str, Any], warned: bool, tmp_path: Path
) -> None:
    runner = launch.build_runner(tiny.toy_config(tmp_path, **options))
    launch.warn_without_start(runner)
    assert ('load_from is empty' in tiny.read_log(tmp_path)) == warned


@HOOKS.register_module()
class OwnCheckpointHook(CheckpointHook):
    """Somebody's."""


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('CheckpointHook', SlopeCheckpointHook),
        (CheckpointHook, SlopeCheckpointHook),
        ('mmengine.hooks.CheckpointHook', SlopeCheckpointHook),
        ('mmengine.hooks.checkpoint_hook.CheckpointHook', SlopeCheckpointHook),
        ('OwnCheckpointHook', OwnCheckpointHook),
    ],
)
@pytest.mark.parametrize('place', ['default_hooks', 'custom_hooks'])
def test_the_checkpoint_hook_is_the_safe_one_however_it_is_named(
    kind: Any, expected: type, place: str, tmp_path: Path
) -> None:
    config = tiny.toy_config(tmp_path)
    hook = dict(type=kind, interval=7)
    if place == 'default_hooks':
        config.default_hooks = dict(checkpoint=hook)
    else:
        config.default_hooks = dict(checkpoint=None)
        config.custom_hooks = [hook]
    runner = launch.build_runner(config)
    (found,) = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    assert type(found) is expected and found.interval == 7


def test_a_lazy_configs_hook_is_the_safe_one(tmp_path: Path) -> None:
    file = tmp_path / 'lazy.py'
    file.write_text(
        'from mmengine.hooks import CheckpointHook\n'
        'default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=7))\n'
    )
    config = tiny.toy_config(tmp_path / 'work')
    config.default_hooks = launch.read_config(str(file)).default_hooks
    runner = launch.build_runner(config)
    (found,) = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    assert type(found) is SlopeCheckpointHook and found.interval == 7
