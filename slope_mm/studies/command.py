"""What ``tools/ablate.py`` does, from its options to the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from mmengine.logging import MMLogger

from slope_mm.analysis.interplay import layer_errors
from slope_mm.engine import launch
from slope_mm.errors import ConfigError, RecipeError, nearest
from slope_mm.studies.figures import draw_figures
from slope_mm.studies.processes import ROOT, Launcher
from slope_mm.studies.progress import ProgressLine
from slope_mm.studies.results import RESULTS, Results, copy_of, read_results, write_text
from slope_mm.studies.runner import Runner, locked
from slope_mm.studies.study import Study
from slope_mm.studies.study_file import matching, read_study
from slope_mm.studies.tables import markdown
from slope_mm.studies.trials import START, Site, Trial, length, plan_trials

STUDIES = ROOT / 'configs' / 'studies'
WORK_DIRS = Path('work_dirs') / 'studies'


@dataclass(frozen=True)
class Options:
    """The command line; see ``tools/ablate.py --help``."""

    study: Path
    quick: bool = False
    report_only: bool = False
    plan: bool = False
    work_dir: Path | None = None
    out: Path | None = None
    arms: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    jobs: int = 1
    launcher: str = 'none'
    processes: int = 1
    partition: str = ''
    threads: int = 1


def run_study(options: Options) -> bool:
    """Runs or redraws a study.

    Returns:
        Whether no trial failed.

    Raises:
        SlopeError: For everything that can be refused before the first trial runs.
        KeyboardInterrupt: After an interruption, with the results so far saved.
    """
    study = read_study(study_path(options.study), options.quick)
    work_dir = options.work_dir or WORK_DIRS
    out = options.out or work_dir / study.name
    line = ProgressLine()
    if options.report_only:
        for name in ('arms', 'tasks', 'seeds'):
            if getattr(options, name):
                raise ConfigError(
                    f'--{name}: --report-only draws all of results.json; leave one of them out'
                )
        draw(study, read_results(out, study), out, line)
        return True
    with quiet():
        return _run(study, options, work_dir, out, line)


def _run(study: Study, options: Options, work_dir: Path, out: Path, line: ProgressLine) -> bool:
    launcher = Launcher(options.launcher, options.processes, options.partition, options.threads)
    trials, skipped = plan_trials(study, Site(work_dir, options.processes, options.threads))
    chosen = selected(trials, study, options)
    if options.plan:
        line.message(plan_text(chosen, skipped))
        return True
    runner = Runner(launcher, options.jobs, line)
    launch.check_work_dir(str(work_dir))
    launch.check_work_dir(str(out))
    results = read_results(out, study) if (out / RESULTS).exists() else Results(study.name)
    # Arms that have been renamed since cannot be tried again.
    names = {arm.name for arm in study.arms} | {START}
    tasks = {task.name for task in study.tasks}
    results.failed = [f for f in results.failed if f['arm'] in names and f['task'] in tasks]
    results.skipped = [{'task': task, 'reason': reason} for task, reason in skipped.items()]
    for item in results.skipped:
        line.message(f'task {item["task"]} is skipped: {item["reason"]}')

    def save(so_far: Results) -> None:
        so_far.write(out)

    with locked(work_dir / study.name):
        # Rows of trials that are not chosen now stay, where they are this study's.
        runner.run_all(
            trials if chosen == trials else in_order(trials, chosen, results),
            results,
            save,
            lambda: copy_of(out / RESULTS),
        )
        if study.interplay is not None:
            measured = interplay(study, trials, line)
            # Those of tasks that cannot run here stay, or whose start is gone.
            anew = {row['task'] for row in measured}
            kept = [row for row in results.interplay if row['task'] not in anew]
            results.interplay = [*kept, *measured]
            save(results)
    draw(study, results, out, line)
    return not results.failed


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what mmengine and pycocotools say while models are built and measured."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)


def study_path(given: Path) -> Path:
    """The study file: a path, or the name of one in ``configs/studies``."""
    named = STUDIES / f'{given.name}.py'
    return given if given.is_file() or not named.is_file() else named


def selected(trials: Sequence[Trial], study: Study, options: Options) -> list[Trial]:
    """The trials of ``--arms``, ``--tasks`` and ``--seeds``."""
    chosen = list(trials)
    if options.arms:
        arms = matching(options.arms, [arm.name for arm in study.arms], '--arms')
        chosen = [trial for trial in chosen if trial.arm is not None and trial.arm.name in arms]
    if options.tasks:
        known = [task.name for task in study.tasks]
        for task in options.tasks:
            if task not in known:
                raise ConfigError(f'--tasks: there is no {task!r}{nearest(task, known)}')
        chosen = [trial for trial in chosen if trial.task.name in options.tasks]
    if options.seeds:
        seeds = sorted({trial.seed for trial in chosen})
        unknown = sorted(set(options.seeds) - set(seeds))
        if unknown:
            raise ConfigError(f'--seeds: nothing that is chosen has seeds {unknown}: {seeds}')
        chosen = [trial for trial in chosen if trial.seed in options.seeds]
    return chosen


def in_order(trials: Sequence[Trial], chosen: Sequence[Trial], results: Results) -> list[Trial]:
    """The chosen trials and those that are finished anyway, in the study's order."""
    known = {row['config_hash'] for row in results.rows}
    return [t for t in trials if t in chosen or t.result() is not None or t.key in known]


def plan_text(trials: Sequence[Trial], skipped: dict[str, str]) -> str:
    """What would run, an arm a line."""
    counts: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        steps, unit = length(trial.config)
        name = trial.arm.name if trial.arm is not None else ''
        counts.setdefault((trial.task.name, name, f'{steps} {unit}s'), []).append(trial)
    lines = [
        f'{task:<10} {arm:<34} {len(group)} seeds x {steps}'
        f' ({sum(t.result() is not None for t in group)} done)'
        for (task, arm, steps), group in counts.items()
    ]
    starts = {trial.start for trial in trials if trial.start is not None}
    lines += [
        f'{s.task.name:<10} start, seed {s.seed}, {length(s.config)[0]} epochs' for s in starts
    ]
    lines += [f'{task:<10} skipped: {reason}' for task, reason in skipped.items()]
    done = sum(trial.result() is not None for trial in trials)
    return '\n'.join([*lines, f'{len(trials)} trials, {done} of them done, {len(starts)} starts'])


def interplay(study: Study, trials: Sequence[Trial], line: ProgressLine) -> list[dict[str, object]]:
    """The weight errors of the study's patterns and bits on every task's first start.

    A task has none without a checkpoint to start from, and none of a pattern that does not fit its
    model, which is said.
    """
    rows: list[dict[str, object]] = []
    settings = study.interplay or {}
    for task in study.tasks:
        first = next((t for t in trials if t.task.name == task.name), None)
        if first is None:
            continue
        if first.start is not None:
            config, checkpoint = first.start.config, first.start.weights
        else:
            config, checkpoint = launch.read_config(task.config), first.config.get('load_from')
        if checkpoint is None or not Path(str(checkpoint)).exists():
            continue
        model = launch.build_model(config)
        launch.load_weights(model, str(checkpoint))
        for sparsity in settings['sparsity']:
            for bits in settings['bits']:
                try:
                    found = layer_errors(model, sparsity, bits)
                except RecipeError as error:
                    line.message(f'task {task.name}: interplay of {sparsity}, {bits} bits: {error}')
                    continue
                rows += [{'task': task.name, **errors.as_dict()} for errors in found]
    return rows


def draw(study: Study, results: Results, out: Path, line: ProgressLine) -> None:
    """Writes ``results.md`` and the figures, and says where they are."""
    pictures = draw_figures(study, results, out)
    text = markdown(study, results)
    write_text(out / 'results.md', text)
    line.message('\n' + text)
    names = ', '.join(['results.md', RESULTS, *(path.name for path in pictures)])
    line.message(f'In {out}: {names}')
    if results.failed:
        line.message(f'{len(results.failed)} trials failed; run it again to try them once more')
