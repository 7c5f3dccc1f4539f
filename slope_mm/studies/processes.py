"""The tools' processes: their command lines, surroundings, logs and last words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slope_mm.errors import ConfigError, SlopeError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
LAUNCHERS = ('none', 'pytorch', 'slurm')
FIRST_PORT = 29600
PROGRESS = re.compile(r'Epoch\(train\)\s+\[(?P<epoch>\d+)\]\[\s*(?P<at>\d+)/(?P<of>\d+)\]')
ITERATION = re.compile(r'Iter\(train\)\s+\[\s*(?P<at>\d+)/(?P<of>\d+)\]')
# How the last line of a traceback or of a tool's refusal looks.
ERROR = re.compile(r'^(error: .+|([A-Za-z_][\w.]*\.)?\w*(Error|Exception|Interrupt|Exit)\b.*)$')
GRACE_S = 10.0


@dataclass(frozen=True)
class Launcher:
    """How a trial's processes are started.

    Attributes:
        kind: ``'none'``, ``'pytorch'`` or ``'slurm'``.
        processes: Ranks of one trial.
        partition: Slurm's partition.
        threads: OpenMP threads of a process. Sums depend on how they are split, so this number
            stays what it is however many trials run side by side.
    """

    kind: str = 'none'
    processes: int = 1
    partition: str = ''
    threads: int = 1

    def __post_init__(self) -> None:
        if self.kind == 'none' and self.processes != 1:
            raise ConfigError('--processes needs --launcher pytorch or slurm')
        if self.kind == 'slurm' and not self.partition:
            raise ConfigError('--launcher slurm needs --partition NAME')

    def train(self, config: Path, folder: Path, label: str) -> list[str]:
        """The command that trains a config, or goes on with it."""
        return [*self._command('train', [str(config)], folder, label), '--resume']

    def test(self, config: Path, checkpoint: Path, folder: Path, label: str) -> list[str]:
        """The command that evaluates a checkpoint."""
        return self._command('test', [str(config), str(checkpoint)], folder, label)

    def _command(self, tool: str, what: list[str], folder: Path, label: str) -> list[str]:
        if self.kind == 'slurm':
            return [
                *('bash', str(TOOLS / f'slurm_{tool}.sh'), self.partition, label),
                *(
                    [what[0], str(folder)]
                    if tool == 'train'
                    else [*what, '--work-dir', str(folder)]
                ),
            ]
        if self.kind == 'pytorch':
            script = [str(TOOLS / f'dist_{tool}.sh'), *what, str(self.processes)]
            return ['bash', *script, '--work-dir', str(folder)]
        return [sys.executable, str(TOOLS / f'{tool}.py'), *what, '--work-dir', str(folder)]

    def environment(self, slot: int, jobs: int) -> dict[str, str]:
        """The environment of a process.

        Args:
            slot: Which of the trials that run side by side.
            jobs: How many there are.
        """
        threads = str(self.threads)
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get('PYTHONPATH')) if p)
        made = {
            **os.environ,
            'PYTHON': sys.executable,
            'PYTHONPATH': path,
            'PYTHONUNBUFFERED': '1',
            'OMP_NUM_THREADS': threads,
            'MKL_NUM_THREADS': threads,
            # tools/dist_train.sh reads the first, Slurm's ranks the second.
            'PORT': str(FIRST_PORT + slot),
            'MASTER_PORT': str(FIRST_PORT + slot),
            'GPUS': str(self.processes),
            'GPUS_PER_NODE': os.environ.get('GPUS_PER_NODE', str(min(self.processes, 8))),
        }
        devices = torch.cuda.device_count()
        if devices and self.kind != 'slurm' and jobs > 1:
            # A cluster hands some of its GPUs out by this variable.
            given = [one for one in made.get('CUDA_VISIBLE_DEVICES', '').split(',') if one.strip()]
            names = given[:devices] or [str(i) for i in range(devices)]
            first = slot * self.processes
            chosen = [names[(first + i) % len(names)] for i in range(self.processes)]
            made['CUDA_VISIBLE_DEVICES'] = ','.join(chosen)
        return made


class Interrupted(Exception):
    """The study was stopped while a process ran."""


class Processes:
    """The processes that run at present; all of them can be stopped at once."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(
        self,
        command: list[str],
        environment: dict[str, str],
        log: Path,
        watch: Callable[[str], None] | None = None,
        lock: int | None = None,
    ) -> None:
        """Runs a command and appends its output to a log.

        Args:
            command: Command line.
            environment: Its environment.
            log: Its output.
            watch: Called with every line.
            lock: A file descriptor that it inherits.

        Raises:
            SlopeError: If it fails; with its last error line.
            Interrupted: If :meth:`stop` ended it.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open('a', encoding='utf-8') as file:
            file.write(f'$ {" ".join(command)}\n')
            file.flush()
            with self._lock:
                if self.stopped:
                    raise Interrupted
                # A session of its own: stopping it stops what it started too.
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    errors='replace',
                    env=environment,
                    start_new_session=True,
                    pass_fds=() if lock is None else (lock,),
                )
                self._running.add(process)
            lines: list[str] = []
            try:
                for line in process.stdout or ():
                    file.write(line)
                    file.flush()
                    lines = [*lines[-199:], line.rstrip('\n')]
                    if watch is not None:
                        watch(line)
                code = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
        if self.stopped:
            raise Interrupted
        if code != 0:
            raise SlopeError(last_error(lines, code))

    def stop(self) -> None:
        """Ends all processes, first kindly; none starts any more."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        for process in running:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        # It ended by itself meanwhile.
        return


def last_error(lines: list[str], code: int) -> str:
    """The line that says best why a process failed."""
    if code < 0:
        return f'killed by {signal.Signals(-code).name}'
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        # torch.distributed.run adds its own beneath the rank's.
        if ERROR.match(line) and 'ChildFailedError' not in line:
            return line.removeprefix('error: ')
    return f'exit code {code}' + (f': {said[-1]}' if said else '')


def progress_of(line: str, epochs: int) -> float | None:
    """Share of the training that a line of mmengine's log speaks of, or None."""
    if found := PROGRESS.search(line):
        epoch, at, of = (int(found[name]) for name in ('epoch', 'at', 'of'))
        return (epoch - 1 + at / of) / epochs
    if found := ITERATION.search(line):
        return int(found['at']) / int(found['of'])
    return None
