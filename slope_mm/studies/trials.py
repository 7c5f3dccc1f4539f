"""Trials: one arm on one task with one seed, as a config, a hash of it, and a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from slope_mm.datasets.shapes import ensure_shapes
from slope_mm.engine import launch
from slope_mm.engine.data_files import check_data
from slope_mm.errors import ConfigError, DataError, SlopeError
from slope_mm.studies.arm_configs import arm_config, overridden, without_validation
from slope_mm.studies.digests import digest_now
from slope_mm.studies.study import Arm, Start, Study, Task

START = 'start'
RUNS = 'runs'
WEIGHTS = 'model.pth'
# In an arm's hooks: the weights that its task starts from.
START_WEIGHTS = '{start}'
RESULT = 'result.json'
# What a config says about where things lie, which changes no result.
PLACES = ('work_dir', 'load_from', 'filename')
# It ends a training that came to nothing, and touches no other.
STOP_AT_NAN = {'type': 'slope_mm.SlopeFiniteHook'}
# What has to be alike for two arms to be compared.
SCHEDULE = ('train_cfg', 'param_scheduler', 'train_dataloader')
OPTIMIZER = ('optimizer', 'clip_grad', 'accumulative_counts', 'paramwise_cfg')


@dataclass(frozen=True, eq=False)
class Trial:
    """One training and evaluation.

    Attributes:
        task: Task.
        arm: Arm; None for a start.
        seed: Seed of everything random.
        config: Its config, complete.
        key: Hash of all that its result depends on.
        schedule_key: Hash of start, schedule, optimizer and data order.
        folder: Where it happens.
        start: The start that has to be finished before; None if there is none to train.
    """

    task: Task
    arm: Arm | None
    seed: int
    config: Config
    key: str
    schedule_key: str
    folder: Path
    start: Trial | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f'{self.task.name} / {self.arm_name} / seed {self.seed}'

    @property
    def arm_name(self) -> str:
        """The arm's name, or that of starts."""
        return self.arm.name if self.arm else START

    @property
    def weights(self) -> Path:
        """The checkpoint that is left of it: weights without the optimizer's state."""
        return self.folder / WEIGHTS

    def result(self) -> dict[str, Any] | None:
        """The row of its finished run, or None."""
        path = self.folder / RESULT
        if not path.exists() or (self.arm is None and not self.weights.exists()):
            return None
        return self.named(json.loads(path.read_text()))

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under this trial's name: another arm or study may call the same trial otherwise."""
        return {**row, 'task': self.task.name, 'arm': self.arm_name}


def length(config: Config) -> tuple[int, str]:
    """Length of training and its unit, ``'epoch'`` or ``'iter'``."""
    loop = config.train_cfg
    if loop.get('max_epochs') is not None:
        return int(loop.max_epochs), 'epoch'
    return int(loop.max_iters), 'iter'


@dataclass(frozen=True)
class Site:
    """Where and how trials run, as far as their results depend on it.

    Attributes:
        work_dir: The folder of all studies' runs; equal trials of different studies are one run.
        ranks: Processes of a trial: its batch is theirs together.
        threads: OpenMP threads of a process: sums depend on how they are split.
    """

    work_dir: Path
    ranks: int = 1
    threads: int = 1

    def place(self, name: str) -> Path:
        """The folder of a trial."""
        return self.work_dir / RUNS / name


def plan_trials(study: Study, site: Site) -> tuple[list[Trial], dict[str, str]]:
    """All trials of a study, in the order in which they should run.

    Seed by seed, so that an unfinished study is complete in its first seeds. Everything that can
    be refused is refused here: configs, recipes, optim wrappers, checkpoints.

    Args:
        study: The study.
        site: Where they run.

    Returns:
        The trials without their starts (see :attr:`Trial.start`), and for each task that cannot
        run here the reason.

    Raises:
        SlopeError: If a config cannot be built or run; names the arm.
    """
    trials: list[Trial] = []
    skipped: dict[str, str] = {}
    for task in study.tasks:
        reason = missing_data(task)
        if reason is not None:
            skipped[task.name] = reason
            continue
        starts: dict[int, Trial | None] = {}
        for seed in task.seeds:
            for arm in study.arms:
                if seed not in study.seeds(task, arm):
                    continue
                origin = seed if task.start and task.start.per_seed else task.seeds[0]
                if origin not in starts:
                    starts[origin] = start_trial(task, origin, site)
                first = seed == study.seeds(task, arm)[0]
                trials.append(arm_trial(task, arm, seed, starts[origin], site, check=first))
    order = {name: index for index, name in enumerate(task.name for task in study.tasks)}
    # Stable: tasks one after the other within a seed's turn, arms as in the file.
    trials.sort(key=lambda trial: (_turn(trial), order[trial.task.name]))
    return trials, skipped


def _turn(trial: Trial) -> int:
    return trial.task.seeds.index(trial.seed)


def missing_data(task: Task) -> str | None:
    """Makes a shapes set if the task asks for one; why the data is not there, or None."""
    if task.shapes is not None:
        options = dict(task.shapes)
        if 'root' not in options:
            raise ConfigError(f"task {task.name!r}: shapes has no 'root'; write root='data/shapes'")
        ensure_shapes(options.pop('root'), **options)
    config = overridden(launch.read_config(task.config), task.options, f'task {task.name!r}')
    try:
        for loader in ('train_dataloader', 'test_dataloader'):
            check_data(config.get(loader), loader)
    except DataError as error:
        return str(error)
    return None


def start_trial(task: Task, seed: int, site: Site) -> Trial | None:
    """The training of a task's start; None if there is nothing to train."""
    start = task.start
    if start is None or start.config is None:
        return None
    where = f'task {task.name!r}: start'
    config = overridden(launch.read_config(start.config), start.options, where)
    config = without_validation(config)
    config.randomness = {**config.get('randomness', {}), 'seed': seed}
    # Nothing where it trains from scratch, so that hashes of such starts are what they were.
    context = surroundings(
        task, site, source(None, None, config) if config.get('load_from') else ''
    )
    text = described(config)
    key = hash_of({'config': text, 'metrics': task.metrics, **context, **hook_files(config)})
    # Not by the task's name: tasks that differ in what follows share it.
    place = site.place(f'{Path(start.config).stem}_seed_{seed}_{key}')
    return Trial(task, None, seed, placed(config, place), key, key, place)


def arm_trial(
    task: Task, arm: Arm, seed: int, start: Trial | None, site: Site, *, check: bool
) -> Trial:
    """One arm's trial.

    Args:
        task: Task.
        arm: Arm.
        seed: Seed.
        start: The trial that trains its start, or None.
        site: Where it runs.
        check: Build its model once, to see whether the recipe fits.

    Raises:
        SlopeError: If its config cannot be built; names the arm.
    """
    where = f'arm {arm.name!r} on task {task.name!r}'
    try:
        config = arm_config(task, arm, seed)
        if check:
            launch.build_model(config)
            if arm.recipe is not None:
                launch.check_optim_wrapper(config.optim_wrapper)
    except SlopeError as error:
        raise ConfigError(f'{where}: {error}') from None
    context = surroundings(task, site, source(task.start, start, config))
    text = described(config)
    key = hash_of({'config': text, 'metrics': task.metrics, **context, **hook_files(config)})
    optimizer = text.get('optim_wrapper', {})
    schedule = {name: text.get(name) for name in SCHEDULE}
    schedule['optimizer'] = {name: optimizer.get(name) for name in OPTIMIZER}
    schedule_key = hash_of({**schedule, **context})
    folder = site.place(f'{task.name}_seed_{seed}_{key}')
    config = placed(config, folder)
    if start is not None:
        config.load_from = str(start.weights)
    elif task.start is not None:
        config.load_from = task.start.checkpoint
    fill_in_start(config, where)
    return Trial(task, arm, seed, config, key, schedule_key, folder, start)


def surroundings(task: Task, site: Site, start: str) -> dict[str, Any]:
    """What a result depends on beside the config."""
    return {'start': start, 'data': task.shapes, 'ranks': site.ranks, 'threads': site.threads}


def source(start: Start | None, trial: Trial | None, config: Config) -> str:
    """What a trial starts from, as part of its hash."""
    if trial is not None:
        return trial.key
    return with_digest(str(config.get('load_from') if start is None else start.checkpoint))


def with_digest(path: str) -> str:
    """A checkpoint's place and what is there: a file may be replaced by another of its name."""
    # Not Path's own question, which a name of 300 letters is an error to.
    there = os.path.isfile(os.path.expanduser(path))
    return f'{path} {digest_now(path)}' if there else path


def hook_files(config: Config) -> dict[str, list[str]]:
    """The checkpoints that hooks read, such as a teacher's, as part of a trial's hash.

    Nothing where there are none, so that hashes of such trials are what they were.
    """
    named = _checkpoints(config.get('custom_hooks') or [])
    files = [with_digest(path) for path in named if path != START_WEIGHTS]
    return {'files': files} if files else {}


def _checkpoints(value: Any, key: str = '') -> list[str]:
    """What stands under ``checkpoint``, at any depth."""
    if isinstance(value, Mapping):
        return [path for k, item in value.items() for path in _checkpoints(item, k)]
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in _checkpoints(item, key)]
    return [value] if key == 'checkpoint' and isinstance(value, str) and value else []


def fill_in_start(config: Config, where: str) -> None:
    """Puts the task's start where hooks ask for it.

    Raises:
        ConfigError: If the task has no start.
    """
    start = config.get('load_from')

    def filled(value: Any, hook: str) -> Any:
        if isinstance(value, Mapping):
            return {key: filled(item, hook) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(filled(item, hook) for item in value)
        if value != START_WEIGHTS:
            return value
        if not start:
            raise ConfigError(
                f'{where}: {hook} asks for the weights that the task starts from, but the task has'
                ' no start; name a checkpoint'
            )
        return str(start)

    hooks = config.get('custom_hooks')
    if hooks:
        config.custom_hooks = [filled(dict(hook), str(hook['type'])) for hook in hooks]


def placed(config: Config, folder: Path) -> Config:
    """The config with its folder as work directory."""
    config.work_dir = str(folder)
    return config


def described(config: Config) -> dict[str, Any]:
    """A config as plain data, without what changes no result."""
    plain = config.to_dict()
    for key in ('custom_hooks', 'slope_hooks'):
        if plain.get(key):
            plain[key] = [hook for hook in plain[key] if hook != STOP_AT_NAN]
    return {key: value for key, value in plain.items() if key not in PLACES}


def hash_of(value: Any) -> str:
    """Hash of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
