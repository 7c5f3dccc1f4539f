"""A study file, read and checked before anything runs.

A study is a Python config (``_base_`` works) that names tasks, arms and what is drawn of them:

    title = 'What the regularizer does at 2:4'
    tasks = dict(shapes=dict(config='configs/mask_rcnn_r18_shapes_fp32.py',
                             start=dict(config='configs/mask_rcnn_r18_shapes_scratch.py'),
                             shapes=dict(root='data/shapes'),
                             metrics=dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP')))
    seeds = [0, 1, 2]
    arms = [dict(name='fp32'),
            dict(name='naive', recipe=dict(weight=dict(sparsity='2:4', bits=4))),
            dict(name='slope', recipe=..., regularizer=dict(type='cosine', weight=1.0))]
    tables = [dict(title='At 4 bits', arms=['*'], against='naive', reference='fp32')]
    figures = [dict(kind='size', name='size', series=dict(naive=['naive'], SLOPE=['slope']))]

Names that begin with an underscore are the file's own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.config import Config

from slope_mm.engine.hooks import SlopeScheduleHook
from slope_mm.engine.regularization import Regularizer
from slope_mm.errors import ConfigError, RecipeError, SlopeError, nearest
from slope_mm.ops import check_bits, parse_pattern
from slope_mm.recipe import Recipe
from slope_mm.studies.study import (
    Arm,
    Comparison,
    FigureSpec,
    Start,
    Study,
    Table,
    Task,
    Threshold,
)

STUDY_KEYS = (
    'title',
    'tasks',
    'seeds',
    'arms',
    'tables',
    'figures',
    'interplay',
    'thresholds',
    'quick',
    'not_run',
)
TASK_KEYS = ('config', 'start', 'options', 'seeds', 'metrics', 'shapes', 'title')
START_KEYS = ('config', 'checkpoint', 'options', 'per_seed')
ARM_KEYS = ('name', 'recipe', 'regularizer', 'schedule', 'options', 'seeds', 'tasks')
TABLE_KEYS = ('title', 'arms', 'against', 'reference')
COMPARISON_KEYS = ('title', 'pairs')
FIGURE_KEYS = ('kind', 'name', 'series', 'title', 'reference', 'tasks')
FIGURE_KINDS = ('size', 'operations', 'bits', 'sparsity', 'lambda', 'curves')
QUICK_KEYS = ('tasks', 'seeds', 'arms')
THRESHOLD_KEYS = ('dense', 'sparse', 'quantized', 'combined')
INTERPLAY_KEYS = ('sparsity', 'bits')
SCHEDULE_KEYS = tuple(inspect.signature(SlopeScheduleHook).parameters)


def read_study(path: str | Path, quick: bool = False) -> Study:
    """Reads and checks a study file.

    Args:
        path: The file.
        quick: Take the study's short form.

    Raises:
        ConfigError: Names the file, the place and what is wrong there.
        RecipeError: For a recipe; the same.
    """
    path = Path(path)
    if not path.is_file():
        known = [str(other) for other in sorted(path.parent.glob('*.py'))]
        raise ConfigError(f"there is no study file '{path}'{nearest(str(path), known)}")
    try:
        content = Config.fromfile(str(path), lazy_import=False).to_dict()
    except SlopeError:
        raise
    except Exception as error:
        # A study file is a program: whatever it raises is about the file.
        raise ConfigError(
            f"study file '{path}' cannot be read: {type(error).__name__}: {error}"
        ) from None
    given = {key: value for key, value in content.items() if not key.startswith('_')}
    try:
        return parse_study(given, path.stem, quick)
    except RecipeError as error:
        raise RecipeError(f"study file '{path}': {error}") from None
    except ConfigError as error:
        raise ConfigError(f"study file '{path}': {error}") from None


def parse_study(given: Mapping[str, Any], name: str, quick: bool = False) -> Study:
    """Checks the content of a study file; see :func:`read_study`."""
    _known(given, STUDY_KEYS, 'the study')
    for key in ('tasks', 'arms'):
        if not given.get(key):
            raise ConfigError(f'the study has no {key}; write {key}=…')
    if quick and not given.get('quick'):
        raise ConfigError(
            "the study has no short form; leave --quick out, or write 'quick=dict(…)'"
        )
    short = _known(given.get('quick') or {}, QUICK_KEYS, 'quick')
    tasks = _mapping(given['tasks'], 'tasks')
    seeds = _seeds(given.get('seeds', [0]), 'seeds')
    arms = [_arm(arm, index) for index, arm in enumerate(_list(given['arms'], 'arms'))]
    _unique([arm.name for arm in arms], 'arms', 'name')
    parsed = [_task(key, value, seeds) for key, value in tasks.items()]
    names = [arm.name for arm in arms]
    for arm in arms:
        for task in arm.tasks or ():
            _one_of(task, tasks, f'arm {arm.name!r}: task')
    study = Study(
        name,
        str(given.get('title', name)),
        tuple(parsed),
        tuple(arms),
        tuple(_table(t, i, names) for i, t in enumerate(_list(given.get('tables', []), 'tables'))),
        tuple(
            _figure(f, i, names, list(tasks))
            for i, f in enumerate(_list(given.get('figures', []), 'figures'))
        ),
        _interplay(given.get('interplay')),
        given.get('not_run'),
        tuple(
            _threshold(t, i, names)
            for i, t in enumerate(_list(given.get('thresholds', []), 'thresholds'))
        ),
    )
    _unique([figure.name for figure in study.figures], 'figures', 'name')
    labels = list(dict.fromkeys(label for figure in study.figures for label in figure.series))
    study = replace(
        study, figures=tuple(replace(figure, labels=tuple(labels)) for figure in study.figures)
    )
    return _shortened(study, short, tasks) if quick else study


def _shortened(study: Study, short: Mapping[str, Any], tasks: Mapping[str, Any]) -> Study:
    """The study with the tasks, arms and seeds of its short form."""
    seeds = _seeds(short.get('seeds', [0]), 'quick: seeds')
    changed = []
    for name, change in _mapping(short.get('tasks', {}), 'quick: tasks').items():
        _one_of(name, tasks, 'quick: task')
        merged = Config(dict(tasks[name]))
        merged.merge_from_dict(dict(change))
        changed.append(_task(name, {**merged.to_dict(), 'seeds': list(seeds)}, seeds))
    names = [arm.name for arm in study.arms]
    arms = set(matching(short.get('arms', ['*']), names, 'quick: arms'))
    return replace(
        study,
        name=f'{study.name}_quick',
        title=f'{study.title} (short form)',
        tasks=tuple(changed) or tuple(replace(task, seeds=seeds) for task in study.tasks),
        arms=tuple(arm for arm in study.arms if arm.name in arms),
        tables=tuple(kept for table in study.tables if (kept := _only(table, arms)) is not None),
        figures=tuple(
            replace(
                figure,
                series={
                    label: tuple(name for name in names if name in arms)
                    for label, names in figure.series.items()
                    if arms.intersection(names)
                },
            )
            for figure in study.figures
        ),
        thresholds=tuple(t for t in study.thresholds if arms.issuperset(t.arms)),
    )


def _only(table: Table | Comparison, arms: set[str]) -> Table | Comparison | None:
    """A table without the arms that are not there; None if nothing is left."""
    if isinstance(table, Comparison):
        pairs = tuple(pair for pair in table.pairs if arms.issuperset(pair))
        return replace(table, pairs=pairs) if pairs else None
    if table.against not in arms or not arms.intersection(table.arms):
        return None
    return replace(
        table,
        arms=tuple(name for name in table.arms if name in arms),
        reference=table.reference if table.reference in arms else None,
    )


def matching(patterns: Any, names: Sequence[str], where: str) -> tuple[str, ...]:
    """Names that match shell-style patterns, in the patterns' order.

    Raises:
        ConfigError: If a pattern matches nothing.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in names if name == pattern or fnmatchcase(name, str(pattern))]
        if not hits:
            raise ConfigError(f'{where}: {pattern!r} is no arm{nearest(str(pattern), names)}')
        found += [name for name in hits if name not in found]
    return tuple(found)


def _known(given: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    plain = dict(_mapping(given, where))
    for key in plain:
        if key not in keys:
            raise ConfigError(
                f'{where} has the unknown key {key!r}{nearest(str(key), keys)}; allowed:'
                f' {", ".join(keys)}'
            )
    return plain


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f'{where} is {given!r}; write a dict')
    return given


def _list(given: Any, where: str) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f'{where} is {given!r}; write a list')
    return given


def _unique(names: Sequence[str], where: str, what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{where}: the {what} {name!r} is there more than once')


def _one_of(name: Any, known: Mapping[str, Any] | Sequence[str], where: str) -> str:
    if name not in known:
        raise ConfigError(
            f'{where} {name!r} is unknown; choose one of {list(known)}{nearest(str(name), known)}'
        )
    return str(name)


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = tuple(_list(given, where))
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise ConfigError(f'{where} is {given!r}; write a list of integers >= 0')
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f'{where} is {given!r}; a seed counts once')
    return seeds


def _task(name: str, given: Any, seeds: tuple[int, ...]) -> Task:
    where = f'task {name!r}'
    task = _known(given, TASK_KEYS, where)
    for key in ('config', 'metrics'):
        if not task.get(key):
            raise ConfigError(f'{where} has no {key!r}')
    _is_file(task['config'], where)
    start = None
    if task.get('start') is not None:
        start = Start(**_known(task['start'], START_KEYS, f'{where}: start'))
        if (start.config is None) == (start.checkpoint is None):
            raise ConfigError(f"{where}: start needs either 'config' or 'checkpoint'")
        if start.config is not None:
            _is_file(start.config, f'{where}: start')
    return Task(
        name,
        str(task['config']),
        _mapping(task['metrics'], f'{where}: metrics'),
        start,
        _mapping(task.get('options', {}), f'{where}: options'),
        _seeds(task['seeds'], f'{where}: seeds') if 'seeds' in task else seeds,
        task.get('shapes'),
        str(task.get('title', name)),
    )


def _is_file(path: Any, where: str) -> None:
    if not Path(str(path)).is_file():
        known = [str(other) for other in sorted(Path(str(path)).parent.glob('*.py'))]
        raise ConfigError(f"{where}: there is no config '{path}'{nearest(str(path), known)}")


def _arm(given: Any, index: int) -> Arm:
    arm = _known(given, ARM_KEYS, f'arm {index}')
    name = arm.get('name')
    if not isinstance(name, str) or not re.search(r'[A-Za-z0-9]', name):
        raise ConfigError(f"arm {index} has no 'name'")
    where = f'arm {name!r}'
    made = Arm(
        name,
        arm.get('recipe'),
        arm.get('regularizer', {'type': 'none'}),
        _known(arm.get('schedule', {}), SCHEDULE_KEYS, f'{where}: schedule'),
        _mapping(arm.get('options', {}), f'{where}: options'),
        None if arm.get('seeds') is None else _seeds(arm['seeds'], f'{where}: seeds'),
        None if arm.get('tasks') is None else tuple(_list(arm['tasks'], f'{where}: tasks')),
    )
    try:
        if made.recipe is not None:
            Recipe.parse(made.recipe)
        elif 'regularizer' in arm or made.schedule:
            raise ConfigError('a regularizer or schedule needs a recipe')
        Regularizer.parse(made.regularizer)
        SlopeScheduleHook(**made.schedule)
    except RecipeError as error:
        raise RecipeError(f'{where}: {error}') from None
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from None
    return made


def _table(given: Any, index: int, names: Sequence[str]) -> Table | Comparison:
    where = f'table {index}'
    if 'pairs' in _mapping(given, where):
        return _comparison(given, where, names)
    table = _known(given, TABLE_KEYS, where)
    arms = matching(table.get('arms', ['*']), names, where)
    if table.get('against') is None:
        raise ConfigError(f"{where} has no 'against': the arm that the others are compared with")
    for key in ('against', 'reference'):
        if table.get(key) is not None:
            _one_of(table[key], names, f'{where}: {key}')
    return Table(str(table.get('title', '')), arms, table['against'], table.get('reference'))


def _comparison(given: Any, where: str, names: Sequence[str]) -> Comparison:
    comparison = _known(given, COMPARISON_KEYS, where)
    pairs = []
    for pair in _list(comparison['pairs'], f'{where}: pairs'):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError(
                f'{where}: {pair!r} is no pair; write [arm, what it is compared with]'
            )
        arm, base = (_one_of(name, names, f'{where}: arm') for name in pair)
        pairs.append((arm, base))
    return Comparison(str(comparison.get('title', '')), tuple(pairs))


def _figure(given: Any, index: int, names: Sequence[str], tasks: Sequence[str]) -> FigureSpec:
    where = f'figure {index}'
    figure = _known(given, FIGURE_KEYS, where)
    kind = _one_of(figure.get('kind'), FIGURE_KINDS, f'{where}: kind')
    series = {
        label: matching(patterns, names, f'{where}: series {label!r}')
        for label, patterns in _mapping(figure.get('series'), f'{where}: series').items()
    }
    if figure.get('reference') is not None:
        _one_of(figure['reference'], names, f'{where}: reference')
    only = figure.get('tasks')
    for task in only or ():
        _one_of(task, tasks, f'{where}: task')
    return FigureSpec(
        kind,
        str(figure.get('name', kind)),
        series,
        str(figure.get('title', '')),
        figure.get('reference'),
        None if only is None else tuple(only),
    )


def _interplay(given: Any) -> Mapping[str, tuple[Any, ...]] | None:
    if given is None:
        return None
    plain = _known(given, INTERPLAY_KEYS, 'interplay')
    found = {key: tuple(_list(plain.get(key, ()), f'interplay: {key}')) for key in INTERPLAY_KEYS}
    try:
        for pattern in found['sparsity']:
            parse_pattern(pattern)
        for bits in found['bits']:
            check_bits(bits, 'weight')
    except RecipeError as error:
        raise ConfigError(f'interplay: {error}') from None
    return found


def _threshold(given: Any, index: int, names: Sequence[str]) -> Threshold:
    where = f'threshold {index}'
    threshold = _known(given, THRESHOLD_KEYS, where)
    single = {
        key: _one_of(threshold.get(key), names, f'{where}: {key}')
        for key in ('dense', 'sparse', 'quantized')
    }
    combined = matching(threshold.get('combined', ()), names, f'{where}: combined')
    return Threshold(**single, combined=combined)
