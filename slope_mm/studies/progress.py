"""How far a study is, and when it will be done."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TextIO

from slope_mm.studies.trials import Trial

LINE_INTERVAL_S = 30.0


@dataclass
class Estimator:
    """Expects of a trial what trials like it took: of its arm, of its task, of any.

    Attributes:
        seen: Seconds of finished trials by (task, arm).
    """

    seen: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, trial: Trial, seconds: float) -> None:
        """Learns from a finished trial."""
        self.seen.setdefault(_kind(trial), []).append(seconds)

    def expected(self, trial: Trial, running: Mapping[Trial, float] | None = None) -> float | None:
        """Seconds of a trial; None while nothing is known.

        Args:
            trial: The trial.
            running: Seconds that running trials are on the way to need, for as long as nothing
                like it has finished.
        """
        kind = _kind(trial)
        same_task = [s for (t, _), times in self.seen.items() if t == kind[0] for s in times]
        arms = [s for (_, a), times in self.seen.items() if a != 'start' for s in times]
        for known in (self.seen.get(kind), same_task, arms, list((running or {}).values())):
            if known:
                return sum(known) / len(known)
        return None


def _kind(trial: Trial) -> tuple[str, str]:
    return trial.task.name, 'start' if trial.arm is None else trial.arm.name


def remaining_seconds(
    estimator: Estimator,
    waiting: Iterable[Trial],
    running: Mapping[Trial, tuple[float, float]],
    jobs: int,
) -> float | None:
    """Seconds until a study is done; None while nothing is known.

    Args:
        estimator: What is known about finished trials.
        waiting: Trials that have not begun.
        running: Trial -> (seconds so far, share done).
        jobs: How many run side by side.
    """
    paces = {t: so_far / share for t, (so_far, share) in running.items() if share > 0.02}
    left = []
    for trial, (so_far, share) in running.items():
        total = paces.get(trial) or estimator.expected(trial, paces)
        if total is None:
            return None
        left.append(max(total - so_far, total * (1 - share) * 0.1))
    total_waiting = 0.0
    for trial in waiting:
        expected = estimator.expected(trial, paces)
        if expected is None:
            return None
        total_waiting += expected
    # The last trials do not share their time with anyone.
    return max((sum(left) + total_waiting) / jobs, max(left, default=0.0))


def clock(seconds: float | None) -> str:
    """``'2 h 05 min'``, ``'12 min'``, ``'40 s'``, or ``'?'``."""
    if seconds is None:
        return '?'
    if seconds < 90:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02d} min'


class ProgressLine:
    """One line that says where a study is: rewritten on a terminal, now and then in a log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self._shown = float('-inf')
        self._width = 0
        self._lock = threading.Lock()

    def message(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._clear()
            self.stream.write(text + '\n')
            self.stream.flush()

    def update(self, text: str) -> None:
        """The line that changes."""
        with self._lock:
            if self.terminal:
                self._clear()
                # A line that wraps cannot be taken back.
                text = text[: shutil.get_terminal_size().columns - 1]
                self.stream.write(text)
                self._width = len(text)
            elif time.monotonic() - self._shown > LINE_INTERVAL_S:
                self._shown = time.monotonic()
                self.stream.write(text + '\n')
            self.stream.flush()

    def _clear(self) -> None:
        if self._width:
            self.stream.write('\r' + ' ' * self._width + '\r')
            self._width = 0
