"""pip and other processes: their output goes to a log, and what went wrong is told."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from setup_steps.stack import CONSTRAINTS, PYTHON, ROOT, SETUP_LOG, SetupError

SECONDS_BETWEEN_SIGNS_OF_LIFE = 20


def pip_install(
    title: str,
    arguments: Sequence[str],
    *,
    constrained: bool = True,
    log: Path = SETUP_LOG,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Install with .venv's pip.

    Args:
        title: What is installed, in words.
        arguments: What follows `pip install`.
        constrained: Whether `CONSTRAINTS` holds.
        log: Where pip's output goes.
        environment: Variables to set besides those that are set already.

    Raises:
        SetupError: pip failed; the message has its last lines.
    """
    say(f'{title}: installing')
    command = [PYTHON, '-m', 'pip', 'install', '--no-input', '--disable-pip-version-check']
    if constrained:
        command += ['-c', str(CONSTRAINTS)]
    begin = log.stat().st_size if log.exists() else 0
    if run(title, [*command, *arguments], log, environment or {}) != 0:
        raise SetupError(
            f'{failure(log, begin)}\n{title} could not be installed; the whole output is in {log}'
        )


def run(title: str, command: Sequence[object], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command with its output in a log, and say now and then that it is alive.

    The command gets a process group of its own, which ends with this process.

    Returns:
        The exit status.
    """
    started = time.monotonic()
    with log.open('ab') as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    return process.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE)
                except subprocess.TimeoutExpired:
                    say(f'  {title}: {minutes_since(started)}{progress(log)}')
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def minutes_since(started: float) -> str:
    """The time since a moment of the monotonic clock, as in `6:17 min`."""
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f'{minutes}:{seconds:02d} min'


def progress(log: Path) -> str:
    """How far ninja has come, from the last `[7/77] c++ …` of a log; empty where there is none."""
    with log.open('rb') as lines:
        lines.seek(max(0, log.stat().st_size - 200_000))
        counts = re.findall(rb'^\s*\[(\d+)/(\d+)\] ', lines.read(), re.MULTILINE)
    return ', {} of {} files compiled'.format(*map(int, counts[-1])) if counts else ''


def failure(log: Path, begin: int) -> str:
    """What went wrong: the compiler's complaints, and the last lines before pip's own account.

    Args:
        log: The output of pip.
        begin: Where in the log the failed command begins, in bytes.
    """
    lines = log.read_bytes()[begin:].decode(errors='replace').splitlines()
    end = next((i for i, line in enumerate(lines) if 'subprocess-exited-with-error' in line), None)
    lines = lines[:end]
    complaints = [line for line in lines if re.search(r'FAILED: |[Kk]illed|error: |No space', line)]
    shown = [*complaints[:10], '...', *lines[-15:]] if complaints else lines[-15:]
    return '\n'.join(f'  | {line[:300]}' for line in shown)


def runs(command: Sequence[object]) -> bool:
    """Whether a command ends with status 0; its output is dropped."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0


def installed_version(distribution: str) -> str:
    """The version of what is installed in .venv; empty where it is not."""
    question = f'from importlib.metadata import version; print(version({distribution!r}))'
    return subprocess.run([PYTHON, '-c', question], capture_output=True, text=True).stdout.strip()


def venv_python_version() -> tuple[int, ...]:
    """Major and minor version of .venv's Python."""
    question = 'import sys; print(*sys.version_info[:2])'
    answer = subprocess.run([PYTHON, '-c', question], capture_output=True, text=True).stdout
    return tuple(int(number) for number in answer.split())


def say(message: str) -> None:
    """Tell the user, at once."""
    print(message, flush=True)
