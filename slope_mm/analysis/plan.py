"""A config's plan and report, and the child config that gives any stock config a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from slope_mm.analysis.report import Report, report
from slope_mm.errors import ConfigError, nearest
from slope_mm.recipe import Recipe


def config_report(
    config: Config, recipe: Mapping[str, Any] | Recipe | None = None, title: str = ''
) -> Report:
    """Reports what a config's recipe (or another one) will do to its model.

    Args:
        config: A stock config, or one with a SlopeModel.
        recipe: The recipe; None takes the config's own.
        title: A line above the printed table.

    Raises:
        ConfigError: If there is no model, or no recipe.
        RecipeError: If the recipe does not fit.
    """
    init_default_scope(config.get('default_scope') or 'mmdet')
    model = config.get('model')
    if not isinstance(model, Mapping) or 'type' not in model:
        raise ConfigError("the config has no model with a 'type'; inherit from a detector's config")
    stock = dict(model)
    own = stock.pop('recipe', None)
    stock['type'] = stock.pop('arch', stock['type'])
    recipe = own if recipe is None else recipe
    if recipe is None:
        raise ConfigError(
            'the config has no recipe: this is a stock config; make a compressed one with'
            ' tools/slopeify.py'
        )
    # Built without weights: a plan is about shapes.
    return report(MODELS.build(stock), recipe, title)


def read_recipe(name: str, folder: Path) -> dict[str, Any]:
    """Reads ``recipe`` and ``regularizer`` from a recipe file.

    Args:
        name: ``'w4a4'`` for ``slope_w4a4.py``, ``'dense_w4'``, …, or the path of a file.
        folder: Where named recipes lie.

    Returns:
        Dict with both keys.

    Raises:
        ConfigError: If there is no such recipe, or the file lacks one of the keys.
    """
    candidates = [Path(name), folder / f'{name}.py', folder / f'slope_{name}.py']
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        known = sorted(path.stem.removeprefix('slope_') for path in folder.glob('*.py'))
        raise ConfigError(
            f'there is no recipe {name!r}; choose one of {", ".join(known)}, or give the path of a'
            f' recipe file{nearest(name, known)}'
        )
    content = Config.fromfile(str(path))
    for key in ('recipe', 'regularizer'):
        if key not in content:
            raise ConfigError(f"recipe file '{path}' has no '{key} = dict(...)'")
    return {key: content[key].to_dict() for key in ('recipe', 'regularizer')}


def child_config(stock_path: str, config: Config, recipe: Mapping[str, Any], out: Path) -> str:
    """The text of a config that inherits from a stock one and adds SLOPE.

    Args:
        stock_path: Path of the stock config, or mmengine's ``package::path``.
        config: The same, read.
        recipe: ``recipe`` and ``regularizer``.
        out: Where the text will lie (for the relative path of its base).

    Raises:
        ConfigError: If the config has a SlopeModel already.
    """
    lazy = Path(stock_path).is_file() and Config._is_lazy_import(stock_path)
    if lazy or not isinstance(config.model.type, str):
        raise ConfigError(
            f"'{stock_path}' names classes (mmengine's lazy style), from which no config with"
            ' strings can inherit; write type=SlopeModel, arch=…, recipe=… into a copy of it'
        )
    if 'recipe' in config.model or str(config.model.type).endswith('SlopeModel'):
        raise ConfigError(f"'{stock_path}' has a SlopeModel already; give a stock config")
    frozen = unfrozen_stages(config.model)
    unfrozen = ''
    if frozen:
        unfrozen = '    # A frozen stage would keep the compressed weights that it starts with.\n'
        unfrozen += ''.join(f'    {key}={literal(value)},\n' for key, value in frozen.items())
    hooks = [dict(hook) for hook in config.get('custom_hooks') or []]
    for hook in hooks:
        hook.pop('_scope_', None)
        if str(hook['type']).rpartition('.')[2] == 'MeanTeacherHook':
            # It pairs the parameters of student and teacher by their order.
            hook['type'] = 'slope_mm.SlopeMeanTeacherHook'
    hooks += [
        dict(type='slope_mm.EpochSeedHook'),
        dict(type='slope_mm.SlopeCalibrationHook'),
        dict(type='slope_mm.SlopeScheduleHook'),
        dict(type='slope_mm.SlopeFiniteHook'),
        dict(type='slope_mm.SlopeMonitorHook'),
    ]
    constructor = config.optim_wrapper.get('constructor') if 'optim_wrapper' in config else None
    base = f'    base_constructor={constructor!r},\n' if constructor else ''
    lines = [
        f'_base_ = [{base_path(stock_path, out)!r}]\n',
        'model = dict(\n',
        "    type='slope_mm.SlopeModel',\n",
        f'    arch={config.model.type!r},\n',
        unfrozen,
        f'    recipe={literal(recipe["recipe"])},\n',
        ')\n',
        'optim_wrapper = dict(\n',
        "    constructor='slope_mm.SlopeOptimWrapperConstructor',\n",
        base,
        f'    regularizer={literal(recipe["regularizer"])},\n',
        ')\n',
        'custom_hooks = [\n',
        *(f'    {literal(hook)},\n' for hook in hooks),
        ']\n',
        '# The trained detector to compress: its checkpoint or URL. Fine-tune it at a lower rate\n'
        '# than it was trained with (configs/mask_rcnn_r50_fp32.py: a quarter).\n',
        f'load_from = {config.get("load_from")!r}\n',
    ]
    if config.get('work_dir') is not None:
        lines.append(f'# Not that of the dense run.\nwork_dir = {f"work_dirs/{out.stem}"!r}\n')
    return ''.join(lines)


def unfrozen_stages(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model section overrides so that no stage of a backbone is frozen, however deep."""
    found: dict[str, Any] = {}
    for key, part in model.items():
        if isinstance(part, Mapping):
            inner = unfrozen_stages(part)
            stages = part.get('frozen_stages')
            if isinstance(stages, int) and stages >= 0:
                inner['frozen_stages'] = -1
            if inner:
                found[key] = inner
    return found


def base_path(stock_path: str, out: Path) -> str:
    """What a config that lies at ``out`` writes into ``_base_`` to inherit from another one."""
    if '::' in stock_path:
        return stock_path
    # A link's own bases lie beside the link.
    given = Path(os.path.abspath(stock_path))
    for parent in given.resolve().parents:
        if parent.name == 'configs' and parent.parent.name == '.mim':
            package = parent.parent.parent.name
            return f'{package}::{given.resolve().relative_to(parent).as_posix()}'
    return Path(os.path.relpath(given, out.resolve().parent)).as_posix()


def literal(value: Any) -> str:
    """A value the way configs are written: ``dict(key=value)``."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return 'dict(' + ', '.join(f'{k}={literal(v)}' for k, v in value.items()) + ')'
        return '{' + ', '.join(f'{k!r}: {literal(v)}' for k, v in value.items()) + '}'
    if isinstance(value, list):
        return '[' + ', '.join(map(literal, value)) + ']'
    return repr(value)
