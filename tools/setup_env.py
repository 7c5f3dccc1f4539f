"""Make, check or mend an environment. The Makefile calls it with the system's Python.

It knows the standard library alone. The order of the steps matters: torch first, then mmcv compiled
against exactly that torch, then everything else, and at the end the proof
(`python -m slope_mm.environment`). Every step looks at what is there already, so that a set-up that
was interrupted goes on where it stopped. What .venv was made for is kept in .venv/slope-setup.json;
its `made_from` entry is written when everything has passed.

The variable SLOPE_STACK names another environment of `STACKS` (setup_steps/stack.py) to make in
place of .venv.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from setup_steps.mmcv_operators import compiler, install_mmcv, mend_opencv
from setup_steps.processes import installed_version, pip_install, runs, say
from setup_steps.stack import (
    CONSTRAINTS,
    DEFAULT_TORCH,
    FALLBACK_TORCH,
    PYTHON,
    REQUIREMENTS,
    ROOT,
    SETUP_LOG,
    STACK,
    STATE,
    VENV,
    SetupError,
    requirements,
)

#: pip from 22 on can install an editable project whose metadata is in setup.cfg alone.
BUILD_TOOLS = ('pip>=22', 'setuptools<82', 'wheel', 'ninja')


def main() -> int:
    """Run the set-up; return the exit status."""
    arguments = parse_arguments()
    if arguments.if_needed and is_complete(arguments.torch):
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        check_machine()
        with sole_setup():
            # Another set-up may have done the work while this one waited for it.
            if not (arguments.if_needed and is_complete(arguments.torch)):
                set_up(arguments.torch, arguments.jobs)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('set-up interrupted; the next make goes on from here', file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line. The Makefile passes empty strings for variables that are not set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--torch',
        default='',
        help=f'torch to install (default: what {STACK.folder} has, or {STACK.torch})',
    )
    parser.add_argument(
        '--jobs', default='', help='compilers that may run at once (default: one per core)'
    )
    parser.add_argument(
        '--if-needed', action='store_true', help='do nothing where it is complete and up to date'
    )
    arguments = parser.parse_args()
    arguments.torch = arguments.torch.strip()
    arguments.jobs = arguments.jobs.strip() or str(usable_cores())
    if not arguments.jobs.isdigit() or int(arguments.jobs) < 1:
        parser.error(f'MAX_JOBS must be a positive whole number, not {arguments.jobs!r}')
    if arguments.torch and not re.match(r'torch\b(?!-)', arguments.torch):
        parser.error(f"TORCH must be a requirement such as 'torch==2.4.1', not {arguments.torch!r}")
    return arguments


def set_up(torch_request: str, jobs: str) -> None:
    """Bring .venv to the state that the files of this project ask for, and prove it."""
    make_venv()
    state = read_state()
    state.pop('made_from', None)
    write_state(state)

    state['torch'] = install_torch(torch_request or state.get('torch', STACK.torch))
    write_state(state)
    torch = installed_version('torch')
    write_constraints(torch)
    pip_install('build tools', BUILD_TOOLS)

    install_mmcv(jobs, built_for=state.get('mmcv_built_for'))
    state['mmcv_built_for'] = torch
    write_state(state)

    pip_install('mmengine and mmdet', ('-r', str(REQUIREMENTS)))
    pip_install('slope_mm and the test tools', ('--no-build-isolation', '-e', '.[test]'))
    mend_opencv()
    if subprocess.run([PYTHON, '-m', 'slope_mm.environment'], cwd=ROOT).returncode != 0:
        raise SetupError(f'the environment is not usable. What was installed how: {SETUP_LOG}')
    state['made_from'] = fingerprint(state['torch'])
    write_state(state)


# --- before anything is done ------------------------------------------------------------------


def check_machine() -> None:
    """Look for what must be there beforehand.

    Raises:
        SetupError: Something is missing; it is named, with the way to get it.
    """
    if compiler() is None:
        mend = 'install g++ (Debian: apt-get install g++)'
        if os.environ.get('CXX'):
            mend = f'correct the variable CXX ({os.environ["CXX"]!r} cannot be run)'
        raise SetupError(f'slope_mm needs a C++ compiler: {mend} and run make again')
    if venv_works():
        return
    version = '{}.{}'.format(*sys.version_info)
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise SetupError(
            f"slope_mm needs Python's venv module, which this Python {version} lacks: install it"
            f' (Debian: apt-get install python{version}-venv) and run make again'
        ) from None
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        raise SetupError(
            f"slope_mm needs Python's header files, which this Python {version} lacks: install them"
            f' (Debian: apt-get install python{version}-dev) and run make again'
        )


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def sole_setup() -> Iterator[None]:
    """Wait until no other set-up is at work on this folder, and keep others waiting."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say('another set-up is at work here; waiting for it')
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# --- what .venv was made for ------------------------------------------------------------------


def is_complete(torch_request: str) -> bool:
    """Whether .venv was made from the files as they are now, for this torch (empty: any)."""
    state = read_state()
    torch = torch_request or state.get('torch', '')
    return PYTHON.exists() and bool(torch) and state.get('made_from') == fingerprint(torch)


def fingerprint(torch_request: str) -> str:
    """A digest of everything that decides what belongs into .venv."""
    # The project is installed by its path: a clone that was copied or moved is another one.
    digest = hashlib.sha256(f'{torch_request}\0{ROOT}'.encode())
    rooms = sorted(Path(__file__).with_name('setup_steps').glob('*.py'))
    for path in (REQUIREMENTS, ROOT / 'setup.cfg', Path(__file__), *rooms):
        digest.update(b'\0' + path.read_bytes())
    return digest.hexdigest()


def read_state() -> dict[str, str]:
    """What an earlier set-up has noted; empty where there was none."""
    try:
        return json.loads(STATE.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def write_state(state: Mapping[str, str]) -> None:
    """Note how far the set-up has come, in one step, so that no half-written file remains."""
    draft = STATE.with_suffix('.draft')
    draft.write_text(json.dumps(state, indent=2) + '\n')
    draft.replace(STATE)


# --- the first steps --------------------------------------------------------------------------


def make_venv() -> None:
    """Make .venv unless a working one is there."""
    if venv_works():
        return
    anew = 'made anew, as it does not work' if VENV.exists() else 'made'
    say(f'{STACK.folder}: {anew}')
    # Not from inside: where a venv is active, make the new one with the Python behind it.
    python = sys.executable
    if sys.prefix != sys.base_prefix:
        python = str(Path(sys.base_prefix, 'bin', 'python{}.{}'.format(*sys.version_info)))
    result = subprocess.run(
        [python, '-m', 'venv', '--clear', str(VENV)], capture_output=True, text=True
    )
    if result.returncode != 0:
        raise SetupError(f'cannot make {VENV}: {(result.stderr or result.stdout).strip()}')


def venv_works() -> bool:
    """Whether .venv has a Python that slope_mm can use, and pip."""
    question = 'import sys, pip; sys.exit(sys.version_info < (3, 10))'
    return PYTHON.exists() and runs([PYTHON, '-c', question])


def install_torch(request: str) -> str:
    """Install torch and say which one was taken.

    Returns:
        The requirement that was met: the request, or the fallback where the default is not to be
        had for this Python and platform.
    """
    try:
        pip_install(request, [request], constrained=False)
    except SetupError:
        if request != DEFAULT_TORCH:
            raise
        say(f'{request} is not to be had here; taking the newest of {FALLBACK_TORCH} instead')
        request = FALLBACK_TORCH
        pip_install(request, [request], constrained=False)
    say(f'torch {installed_version("torch")} is installed')
    return request


def write_constraints(torch: str) -> None:
    """Keep the later steps from exchanging what mmcv is built against."""
    lines = [f'torch=={torch}', *requirements()]
    if tuple(int(number) for number in re.findall(r'\d+', torch)[:2]) < (2, 3):
        lines.append('numpy<2')  # torch before 2.3 was built for numpy 1
    CONSTRAINTS.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    sys.exit(main())
