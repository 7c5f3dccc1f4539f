"""Make, check or mend an environment. The Makefile calls it with the system's Python.

It knows the standard library alone. The order of the steps matters: torch first, then mmcv compiled
against exactly that torch, then everything else, and at the end the proof
(`python -m slope_mm.environment`). Every step looks at what is there already, so that a set-up that
was interrupted goes on where it stopped. What .venv was made for is kept in .venv/slope-setup.json;
its `made_from` entry is written when everything has passed.

The variable SLOPE_STACK names another environment of `STACKS` to make in place of .venv.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stack:
    """An environment that this file can make.

    Attributes:
        folder: Its virtual environment, in the project's folder.
        requirements: The file that lists what is in it.
        mmcv: The distribution that is mmcv there.
        torch: The torch that it gets where none is asked for.
    """

    folder: str
    requirements: str
    mmcv: str
    torch: str


#: Named exactly, as the newest torch may be a CUDA build of several GB where this one has a small
#: CPU build. Where it is not to be had, any torch of the second form does.
DEFAULT_TORCH = 'torch==2.13.0'
FALLBACK_TORCH = 'torch>=2.1'
STACKS = {
    'openmmlab': Stack('.venv', 'requirements.txt', 'mmcv', DEFAULT_TORCH),
    # The maintained forks.
    'onedl': Stack('.venv-onedl', 'requirements-onedl.txt', 'onedl-mmcv', DEFAULT_TORCH),
    # The oldest torch that setup.cfg promises.
    'oldest': Stack('.venv-oldest', 'requirements.txt', 'mmcv', 'torch==2.1.*'),
}
STACK_NAME = os.environ.get('SLOPE_STACK') or 'openmmlab'
if STACK_NAME not in STACKS:
    sys.exit(f'SLOPE_STACK={STACK_NAME} is none of {", ".join(STACKS)}')
STACK = STACKS[STACK_NAME]

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / STACK.folder
PYTHON = VENV / 'bin' / 'python'
STATE = VENV / 'slope-setup.json'
CONSTRAINTS = VENV / 'constraints.txt'
SETUP_LOG = VENV / 'setup.log'
MMCV_LOG = VENV / 'mmcv-build.log'
REQUIREMENTS = ROOT / STACK.requirements
PROOF = ROOT / 'slope_mm' / 'environment' / 'operators.py'

#: pip from 22 on can install an editable project whose metadata is in setup.cfg alone.
BUILD_TOOLS = ('pip>=22', 'setuptools<82', 'wheel', 'ninja')
#: -O2 without debug symbols halves the compile time of mmcv; its operators stay as fast.
COMPILER_FLAGS = '-O2 -g0'
SECONDS_BETWEEN_SIGNS_OF_LIFE = 20


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


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


# --- before anything is done -----------------------------------------------------------------


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


def compiler() -> str | None:
    """The C++ compiler to use: the one that CXX names, or the first of the usual ones."""
    named = os.environ.get('CXX', '').split()
    candidates = named[:1] or ['c++', 'g++', 'clang++']
    return next((name for name in candidates if shutil.which(name)), None)


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


# --- what .venv was made for -----------------------------------------------------------------


def is_complete(torch_request: str) -> bool:
    """Whether .venv was made from the files as they are now, for this torch (empty: any)."""
    state = read_state()
    torch = torch_request or state.get('torch', '')
    return PYTHON.exists() and bool(torch) and state.get('made_from') == fingerprint(torch)


def fingerprint(torch_request: str) -> str:
    """A digest of everything that decides what belongs into .venv."""
    digest = hashlib.sha256(torch_request.encode())
    for path in (REQUIREMENTS, ROOT / 'setup.cfg', Path(__file__)):
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


# --- the steps -------------------------------------------------------------------------------


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


def install_mmcv(jobs: str, built_for: str | None) -> None:
    """Install mmcv with operators that belong to the installed torch.

    Args:
        jobs: How many compilers may run at once.
        built_for: The torch that the mmcv in .venv was built for, where an earlier set-up noted it.

    Raises:
        SetupError: The build failed, or its operators do not work with the installed torch.
    """
    requirement = next(line for line in requirements() if line.startswith(f'{STACK.mmcv}=='))
    torch = installed_version('torch')
    if installed_version(STACK.mmcv) == requirement.partition('==')[2]:
        mend_opencv()
        if built_for in (None, torch) and operators_work():
            say(f'{requirement} with operators for torch {torch} is installed')
            return
        say(f'the installed mmcv has no operators for torch {torch}; building it anew')
        build_mmcv(requirement, jobs, anew=True)
    else:
        build_mmcv(requirement, jobs, anew=False)
        mend_opencv()
        if operators_work():
            return
        # pip's cache had a wheel, and does not know for which torch it was built.
        say(f"the mmcv from pip's cache has no operators for torch {torch}; building it anew")
        build_mmcv(requirement, jobs, anew=True)
    if not operators_work():
        raise SetupError(
            f'mmcv was built, but its operators do not work with torch {torch};'
            f' {PYTHON} {PROOF} shows why, {MMCV_LOG} how it was built'
        )


def build_mmcv(requirement: str, jobs: str, *, anew: bool) -> None:
    """Build mmcv's operators against the installed torch.

    Args:
        requirement: Which mmcv.
        jobs: How many compilers may run at once.
        anew: Whether to leave pip's cache aside and replace an installed mmcv.
    """
    environment = {
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': jobs,
        'CXX': os.environ.get('CXX') or compiler() or 'c++',
        **{
            name: f'{os.environ.get(name, "")} {COMPILER_FLAGS}'.strip()
            for name in ('CFLAGS', 'CXXFLAGS')
        },
        **compile_target(),
    }
    options = ['-v', '--no-build-isolation']
    if anew:
        options += ['--no-cache-dir', '--force-reinstall', '--no-deps']
    MMCV_LOG.unlink(missing_ok=True)
    say(
        f'{requirement}: compiling its operators for torch {installed_version("torch")} with {jobs}'
        ' jobs. This takes about ten minutes on two cores'
        + ('.' if anew else " (seconds where pip's cache has them).")
    )
    needs_mending = STACK.mmcv == 'mmcv' and venv_python_version() >= (3, 13)
    source = str(corrected_source(requirement)) if needs_mending else requirement
    started = time.monotonic()
    try:
        pip_install('mmcv', [*options, source], log=MMCV_LOG, environment=environment)
    except SetupError as error:
        advice = 'where compilers were killed for want of memory, run make MAX_JOBS=1 setup'
        raise SetupError(f'{error}; {advice}') from None
    say(f'mmcv: installed after {minutes_since(started)}')


def compile_target() -> dict[str, str]:
    """Environment variables that make mmcv build for the GPU where it can, else for the CPU.

    mmcv builds for the GPU whenever torch sees one, and fails where it then finds no nvcc of
    torch's own CUDA generation.
    """
    question = 'import torch; print(torch.version.cuda if torch.cuda.is_available() else "")'
    cuda = subprocess.run([PYTHON, '-c', question], capture_output=True, text=True).stdout.strip()
    if not cuda or cuda == 'None':  # no GPU, or one of another maker: mmcv's own judgement stands
        return {}
    home = os.environ.get('CUDA_HOME')
    nvcc = shutil.which('nvcc', path=f'{home}/bin' if home else None) or '/usr/local/cuda/bin/nvcc'
    with contextlib.suppress(OSError):
        answer = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
        release = re.search(r'release (\d+)\.', answer)
        if release and release.group(1) == cuda.split('.')[0]:
            return {}
    say(f'no nvcc of CUDA {cuda} was found: mmcv gets its CPU operators alone')
    return {'CUDA_VISIBLE_DEVICES': '-1', 'FORCE_CUDA': '0'}


def corrected_source(requirement: str) -> Path:
    """Unpack mmcv's source with a setup.py that Python 3.13 can run.

    mmcv 2.1.0 reads its version with a bare `exec` and finds it in `locals()`, which Python 3.13
    (PEP 667) no longer allows. pip runs setup.py even to download, so it is made to leave behind
    what it unpacked when that fails.
    """
    folder = VENV / 'mmcv-source'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [PYTHON, '-m', 'pip', 'download', '--no-clean', '--no-deps', '--no-build-isolation']
    command += ['--no-binary', 'mmcv', '--dest', str(folder), requirement]
    run('mmcv source', command, SETUP_LOG, {'TMPDIR': str(folder)})
    script = next(folder.glob('pip-*/mmcv_*/setup.py'), None)
    if script is None:
        raise SetupError(f'cannot fetch the source of {requirement}; see {SETUP_LOG}')
    text = script.read_text()
    text = text.replace("version_file, 'exec'))", "version_file, 'exec'), globals())")
    script.write_text(text.replace("locals()['__version__']", "globals()['__version__']"))
    return script.parent


def operators_work() -> bool:
    """Whether mmcv's operators load and give the known answers, in a process of their own."""
    return runs([PYTHON, PROOF])


def mend_opencv() -> None:
    """Replace OpenCV's files by those of its headless build where its windows cannot be loaded.

    The headless build is laid over the usual one: the names that mmcv requires stay installed, so
    that no later step brings the usual build back.
    """
    if runs([PYTHON, '-c', 'import cv2']):
        return
    say('OpenCV cannot load its windows on this machine; taking the build without them')
    version = installed_version('opencv-python')
    headless = 'opencv-python-headless' + (f'=={version}' if version else '')
    pip_install(headless, ['--no-deps', '--force-reinstall', headless])


# --- pip, processes, files -------------------------------------------------------------------


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


def requirements() -> list[str]:
    """The requirements of requirements.txt without its comments."""
    lines = (line.partition('#')[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


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


if __name__ == '__main__':
    sys.exit(main())
