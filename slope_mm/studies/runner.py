"""Runs what a study has left to run, several trials side by side, and collects the rows."""

from __future__ import annotations

import fcntl
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.runner import find_latest_checkpoint

from slope_mm.engine import launch
from slope_mm.errors import ConfigError, SlopeError
from slope_mm.studies.measure import (
    can_weigh,
    curves_of,
    keep_weights,
    machine,
    measured,
    metrics_of,
    start_digest,
    treatment,
    versions,
    weights_digest,
)
from slope_mm.studies.processes import Interrupted, Launcher, Processes, progress_of
from slope_mm.studies.progress import Estimator, ProgressLine, clock, remaining_seconds
from slope_mm.studies.results import Results, finished_rows, write_text
from slope_mm.studies.trials import RESULT, Trial, length

CONFIG = 'config.py'
SECONDS = 'seconds.json'
BEGAN_FROM = 'start_digest.json'
LOCK = '.lock'
POLL_S = 1.0


class Runner:
    """Runs trials.

    Args:
        launcher: How their processes start.
        jobs: How many trials run side by side.
        line: Where progress goes.
    """

    def __init__(self, launcher: Launcher, jobs: int = 1, line: ProgressLine | None = None) -> None:
        if jobs < 1:
            raise ConfigError(f'--jobs {jobs} is not a number >= 1')
        self.launcher, self.jobs = launcher, jobs
        self.line = line or ProgressLine()
        self.processes = Processes()
        self.shares: dict[Trial, float] = {}
        self.began: dict[Trial, float] = {}
        self.facts = {'versions': versions(), 'machine': machine(launcher)}

    # --- one trial ---------------------------------------------------------------------------

    def run(self, trial: Trial, slot: int = 0) -> dict[str, Any]:
        """Trains and evaluates one trial, or goes on with it; returns its row.

        Raises:
            SlopeError: If a process fails; with its last error line.
            Interrupted: If the study was stopped.
        """
        launch.check_work_dir(str(trial.folder))
        with locked(trial.folder, self._waiting(trial)) as lock:
            # Starts are shared: another study may have trained it meanwhile.
            done = trial.result()
            if done is not None:
                return done
            config = trial.folder / CONFIG
            # Anew each time: the start may have moved with the folder of all runs.
            write_text(config, trial.config.pretty_text)
            environment = self.launcher.environment(slot, self.jobs)
            if not trial.weights.exists():
                self._train(trial, config, environment, lock)
            command = self.launcher.test(config, trial.weights, trial.folder / 'test', trial.name)
            with self._timed(trial, 'test'):
                self.processes.run(command, environment, trial.folder / 'test.log', lock=lock)
            row = self._row(trial)
            write_text(trial.folder / RESULT, json.dumps(row, allow_nan=False) + '\n')
            return row

    def _waiting(self, trial: Trial) -> Callable[[], None]:
        told = False

        def wait_or_stop() -> None:
            nonlocal told
            if self.processes.stopped:
                raise Interrupted
            if not told:
                self.line.message(f'{trial.name} waits for another process in {trial.folder}')
            told = True

        return wait_or_stop

    def _train(self, trial: Trial, config: Path, environment: dict[str, str], lock: int) -> None:
        steps, unit = length(trial.config)
        last = find_latest_checkpoint(str(trial.folder))
        if last is None:
            # Now: a start that is trained anew later is not what this trial began from.
            write_text(trial.folder / BEGAN_FROM, json.dumps(start_digest(trial)) + '\n')
        if last is None or Path(last).name != f'{unit}_{steps}.pth':

            def watch(line: str) -> None:
                share = progress_of(line, steps)
                if share is not None:
                    self.shares[trial] = share

            command = self.launcher.train(config, trial.folder, trial.name)
            with self._timed(trial, 'train'):
                log = trial.folder / 'train.log'
                self.processes.run(command, environment, log, watch, lock=lock)
            last = find_latest_checkpoint(str(trial.folder))
        if last is None:
            raise SlopeError(f"the training left no checkpoint in '{trial.folder}'")
        keep_weights(Path(last), trial.weights)

    def _row(self, trial: Trial) -> dict[str, Any]:
        spent = json.loads((trial.folder / SECONDS).read_text())
        return {
            'task': trial.task.name,
            'arm': trial.arm_name,
            'seed': trial.seed,
            **metrics_of(trial.folder / 'test', trial.task.metrics),
            **measured(trial),
            **treatment(trial.arm),
            'curves': curves_of(trial.folder),
            'config_hash': trial.key,
            'start_digest': self._digest(trial),
            'schedule_hash': trial.schedule_key,
            **self.facts,
            'wall_s': round(sum(spent.values()), 1),
            'train_s': round(spent.get('train', 0.0), 1),
            'test_s': round(spent.get('test', 0.0), 1),
        }

    @staticmethod
    def _digest(trial: Trial) -> str | None:
        """The digest of a trial's start, or of its own weights if it is one; None if unknown."""
        if trial.arm is None:
            return weights_digest(trial.weights)
        path = trial.folder / BEGAN_FROM
        return json.loads(path.read_text()) if path.exists() else None

    def _weighed(self, trial: Trial, row: dict[str, Any]) -> dict[str, Any]:
        """A row from before files could be written gets its file's length."""
        if not can_weigh(trial, row):
            return row
        row = {**row, **measured(trial)}
        write_text(trial.folder / RESULT, json.dumps(row, allow_nan=False) + '\n')
        return row

    @contextmanager
    def _timed(self, trial: Trial, what: str) -> Iterator[None]:
        """Adds the time of a step to what it took before an interruption."""
        path = trial.folder / SECONDS
        spent = json.loads(path.read_text()) if path.exists() else {}
        began = time.monotonic()
        try:
            yield
        finally:
            spent[what] = spent.get(what, 0.0) + time.monotonic() - began
            write_text(path, json.dumps(spent) + '\n')

    # --- all of them -------------------------------------------------------------------------

    def run_all(
        self,
        trials: Sequence[Trial],
        results: Results,
        save: Callable[[Results], None],
        keep_copy: Callable[[], Path],
    ) -> None:
        """Runs all trials that have no row yet, their starts first.

        Args:
            trials: In the order in which they should run.
            results: Rows of finished trials are added here, failures as well. Rows that it brings
                along count as finished where their hash is the trial's.
            save: Called after every trial.
            keep_copy: Copies what was saved before, and says where to; called where rows are lost.

        Raises:
            KeyboardInterrupt: After all processes were ended and the results saved.
        """
        before = [*results.rows]
        away = {item['task'] for item in results.skipped}
        # Of tasks that cannot run here: they stay.
        kept = [row for row in results.rows if row['task'] in away]
        kept_starts = [row for row in results.starts if row['task'] in away]
        known = finished_rows(results.rows)
        estimator = Estimator()
        rows = {
            t: self._weighed(t, row)
            for t in trials
            if (row := t.result() or known.get(t.key)) is not None
        }
        rows = {t: t.named(row) for t, row in rows.items()}
        starts = {t.start.key: t.start for t in trials if t.start is not None}
        start_rows = {s: row for s in starts.values() if (row := s.result()) is not None}
        for trial, row in (*rows.items(), *start_rows.items()):
            estimator.add(trial, row['wall_s'])
        needed = {t.start.key for t in trials if t not in rows and t.start is not None}
        waiting = [s for k, s in starts.items() if k in needed and s not in start_rows]
        waiting += [t for t in trials if t not in rows]
        total = len(waiting)
        # What failed before is tried again; what is not asked for now stays as it is.
        asked = {(t.task.name, t.arm_name, t.seed) for t in (*trials, *starts.values())}
        results.failed[:] = [
            f for f in results.failed if (f['task'], f['arm'], f['seed']) not in asked
        ]
        known_starts = finished_rows(results.starts)
        collected = {key: known_starts[key] for key in starts if key in known_starts}
        collected.update({start.key: row for start, row in start_rows.items()})

        def collect() -> None:
            results.rows[:] = [*kept, *(rows[t] for t in trials if t in rows)]
            # Once for each task that starts there.
            origins = {(t.task.name, t.start.key): None for t in trials if t.start is not None}
            results.starts[:] = [
                *kept_starts,
                *({**collected[key], 'task': task} for task, key in origins if key in collected),
            ]
            save(results)

        staying = {_identity(row) for row in kept} | {_identity(row) for row in rows.values()}
        lost = [row for row in before if _identity(row) not in staying]
        if lost:
            place = keep_copy()
            first = ' / '.join((lost[0]['task'], lost[0]['arm'], f'seed {lost[0]["seed"]}'))
            self.line.message(
                f'{len(lost)} rows ({first}, …) are of other settings than the study, the ranks or'
                f' the threads have now, and leave the table; a copy of all is {place}'
            )
        collect()
        if rows:
            self.line.message(f'{len(rows)} of {len(trials)} trials are done already')
        free = list(range(self.jobs))
        running: dict[Future[dict[str, Any]], tuple[Trial, int]] = {}
        broken: dict[str, str] = {}
        pool = ThreadPoolExecutor(self.jobs)
        try:
            while waiting or running:
                for trial in [*waiting]:
                    if not free:
                        break
                    start = trial.start
                    if start is not None and start.key in broken:
                        waiting.remove(trial)
                        self._fail(trial, f'its start failed: {broken[start.key]}', results)
                        collect()
                    elif any(trial.key == other.key for other, _ in running.values()):
                        # The same treatment under another name: its result will do.
                        continue
                    elif start is None or start.result() is not None:
                        waiting.remove(trial)
                        slot = free.pop(0)
                        self.began[trial], self.shares[trial] = time.monotonic(), 0.0
                        running[pool.submit(self.run, trial, slot)] = trial, slot
                done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    trial, slot = running.pop(future)
                    free.append(slot)
                    free.sort()
                    self._finish(trial, future, rows, collected, broken, results, estimator)
                    collect()
                self._show(total, waiting, [t for t, _ in running.values()], results, estimator)
        except KeyboardInterrupt:
            self.processes.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            collect()

    def _finish(
        self,
        trial: Trial,
        future: Future[dict[str, Any]],
        rows: dict[Trial, dict[str, Any]],
        starts: dict[str, dict[str, Any]],
        broken: dict[str, str],
        results: Results,
        estimator: Estimator,
    ) -> None:
        """Takes the outcome of one trial in."""
        error = future.exception()
        if isinstance(error, Interrupted):
            return
        if isinstance(error, Exception):
            # Whatever went wrong with one trial says nothing about the others.
            text = ' '.join(str(error).split())
            if not isinstance(error, SlopeError):
                text = f'{type(error).__name__}: {text}'
                trace = ''.join(traceback.format_exception(error))
                write_text(trial.folder / 'error.log', trace)
            if trial.arm is None:
                broken[trial.key] = text
            self._fail(trial, text, results)
            return
        row = future.result()
        estimator.add(trial, row['wall_s'])
        if trial.arm is None:
            starts[trial.key] = row
        else:
            rows[trial] = row
        figures = ', '.join(f'{name} {row[name]:.4g}' for name in trial.task.metrics)
        self.line.message(f'{trial.name}: {figures} ({clock(row["wall_s"])})')

    def _fail(self, trial: Trial, error: str, results: Results) -> None:
        results.failed.append(
            {
                'task': trial.task.name,
                'arm': trial.arm_name,
                'seed': trial.seed,
                'error': error,
            }
        )
        self.line.message(f'{trial.name}: FAILED: {error} (logs in {trial.folder})')

    def _show(
        self,
        total: int,
        waiting: Sequence[Trial],
        running: Sequence[Trial],
        results: Results,
        estimator: Estimator,
    ) -> None:
        if not running:
            return
        now = time.monotonic()
        state = {t: (now - self.began[t], self.shares.get(t, 0.0)) for t in running}
        left = remaining_seconds(estimator, waiting, state, self.jobs)
        each = ' | '.join(f'{t.name} {self.shares.get(t, 0.0):.0%}' for t in running)
        failed = f', {len(results.failed)} failed' if results.failed else ''
        done = total - len(waiting) - len(running)
        self.line.update(f'[{done}/{total}{failed}] ETA {clock(left)} | {each}')


def _identity(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row['task'], row['arm'], row['seed']


@contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[int]:
    """Keeps other processes out of a folder until this one is done.

    Args:
        folder: The folder.
        waiting: Called now and then while another process is in there, and may raise; None does
            not wait.

    Yields:
        The lock's file descriptor. A child that inherits it holds the lock as long as it lives:
        a training that outlived a killed study is waited for, not joined.

    Raises:
        ConfigError: If another process is in there, and it is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open('w') as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting is None:
                    raise ConfigError(
                        f"another process works in '{folder}'; wait for its end, or choose another"
                        ' --work-dir'
                    ) from None
            waiting()
            time.sleep(POLL_S)
        yield file.fileno()
