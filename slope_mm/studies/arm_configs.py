"""The config of a trial: a task's own, with an arm's recipe, regularizer and overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from slope_mm.engine import launch
from slope_mm.engine.refusals import type_name
from slope_mm.engine.regularization import KEYS as REGULARIZER_KEYS
from slope_mm.engine.regularization import Regularizer
from slope_mm.errors import ConfigError, nearest
from slope_mm.recipe import Recipe
from slope_mm.studies.study import Arm, Task


def arm_config(task: Task, arm: Arm, seed: int) -> Config:
    """The config of an arm: the task's fp32 config with recipe, regularizer and overrides."""
    config = overridden(launch.read_config(task.config), task.options, f'task {task.name!r}')
    config = overridden(config, arm.options, f'arm {arm.name!r}')
    for options in (task.options, arm.options):
        refuse_what_the_study_decides(options, task)
    if arm.recipe is not None:
        model = config.model
        if 'recipe' not in model:
            model.arch = model.type
        # Complete, so that two spellings of one treatment are one trial.
        model.type, model.recipe = 'slope_mm.SlopeModel', Recipe.parse(arm.recipe).to_dict()
        wrapper = config.optim_wrapper
        if wrapper.get('constructor') not in (None, 'slope_mm.SlopeOptimWrapperConstructor'):
            wrapper.base_constructor = wrapper.constructor
        wrapper.constructor = 'slope_mm.SlopeOptimWrapperConstructor'
        regularizer = Regularizer.parse(arm.regularizer)
        wrapper.regularizer = {key: getattr(regularizer, key) for key in REGULARIZER_KEYS}
        config.custom_hooks = slope_hooks(config, arm.schedule)
    config.randomness = {**config.get('randomness', {}), 'seed': seed}
    return without_validation(config)


def refuse_what_the_study_decides(options: Mapping[str, Any], task: Task) -> None:
    """Refuses overrides that a trial would not take.

    Raises:
        ConfigError: If there are any; tells where they belong.
    """
    randomness = options.get('randomness')
    if 'randomness.seed' in options or (isinstance(randomness, Mapping) and 'seed' in randomness):
        raise ConfigError('options override the seed, which the study gives; write seeds=[...]')
    if 'load_from' in options and task.start is not None:
        raise ConfigError(
            "options override 'load_from', but the task names a start, from which all its arms"
            ' begin; write start=dict(checkpoint=...), or leave the start out'
        )


def slope_hooks(config: Config, schedule: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The custom hooks of a compressed arm: the SLOPE ones, and what an fp32 arm has beside."""
    hooks: list[dict[str, Any]] = []
    have: set[str] = set()
    for listed in (config.get('slope_hooks') or [], config.get('custom_hooks') or []):
        hooks += [dict(hook) for hook in listed if type_name(hook) not in have]
        have = {type_name(hook) for hook in hooks}
    for name in ('EpochSeedHook', 'SlopeCalibrationHook', 'SlopeScheduleHook', 'SlopeMonitorHook'):
        if name not in have:
            hooks.append({'type': f'slope_mm.{name}'})
    for hook in hooks:
        name = type_name(hook)
        if name == 'SlopeScheduleHook':
            hook.update(schedule)
        elif name == 'SlopeMonitorHook':
            hook['picture'] = False
            # A look for every line of the log that the curves are read from.
            logger = config.get('default_hooks', {}).get('logger', {})
            hook['interval'] = logger.get('interval', hook.get('interval', 50))
    return hooks


def without_validation(config: Config) -> Config:
    """Leaves evaluation to tools/test.py: the last checkpoint counts, whatever came between."""
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    return config


def overridden(config: Config, options: Mapping[str, Any], where: str) -> Config:
    """Merges overrides into a config: nested dicts, or keys with dots.

    Raises:
        ConfigError: If the config has nothing of an override's first names.
    """
    for key in options:
        *parents, _ = names = key.split('.')
        inner: Any = config.to_dict()
        for name in parents or names:
            if not isinstance(inner, Mapping) or name not in inner:
                known = list(inner) if isinstance(inner, Mapping) else []
                raise ConfigError(
                    f'{where}: options override {key!r}, but the config has no {name!r} there'
                    f'{nearest(name, known)}'
                )
            inner = inner[name]
    config.merge_from_dict(dict(options))
    return config
