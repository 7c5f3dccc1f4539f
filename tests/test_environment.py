"""The environment check and the set-up, seen from outside: real processes, real packages."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from slope_mm import environment

ROOT = Path(__file__).resolve().parents[1]
OPENMMLAB_ALONE = pytest.mark.skipif(
    'onedl' in environment.version_table(), reason='the forks ask for neither'
)

# Put into sitecustomize.py, it makes the interpreter find nothing under the given names, as if
# they had never been installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {hidden!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""

IMPORT = """
try:
    import slope_mm
    slope_mm.convert
except Exception as error:
    print(type(error).__module__, type(error).__name__)
    print(error)
"""


def run_python(
    *arguments: str, first_on_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(p) for p in (first_on_path, ROOT) if p)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )


def hide(folder: Path, *names: str) -> Path:
    (folder / 'sitecustomize.py').write_text(HIDE.format(hidden=names))
    return folder


def import_problem(first_on_path: Path) -> str:
    """The message of the error that using slope_mm raises."""
    result = run_python('-c', IMPORT, first_on_path=first_on_path)
    assert result.returncode == 0, result.stderr
    kind, _, message = result.stdout.partition('\n')
    assert kind == 'slope_mm.errors EnvironmentProblem', result.stdout
    assert message.count('\n') == 1, 'the message is one line'
    return message.strip()


def copy_of_mmcv(folder: Path) -> Path:
    origin = importlib.util.find_spec('mmcv').origin
    return Path(shutil.copytree(Path(origin).parent, folder / 'mmcv'))


# --- the proof -------------------------------------------------------------------------------


def test_this_environment_passes_the_proof() -> None:
    result = run_python('-m', 'slope_mm.environment')
    assert result.returncode == 0, result.stderr
    # The forks print lines of their own.
    split = [re.split(r'  +', line, maxsplit=1) for line in result.stdout.splitlines()]
    rows = dict(row for row in split if len(row) == 2)
    import torch

    # Installed versions may leave out what the build was made for (2.1.2 of 2.1.2+cu121).
    assert rows['torch'] in (torch.__version__, torch.__version__.split('+')[0])
    assert rows['mmcv'].startswith('2.')
    assert rows['mmcv operators'].startswith('nms and roi_align are right on')


@pytest.mark.parametrize('operator', ['nms', 'roi_align'])
def test_operators_with_wrong_answers_are_named(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcv import ops

    from slope_mm.environment.operators import wrong_operators

    assert wrong_operators('cpu') == []
    right = getattr(ops, operator)

    def off_by_one(*args: object, **kwargs: object) -> object:
        answer = right(*args, **kwargs)
        return (answer[0], answer[1] + 1) if operator == 'nms' else answer + 1

    monkeypatch.setattr(ops, operator, off_by_one)
    assert wrong_operators('cpu') == [operator]


# --- what is said when something is missing or unusable --------------------------------------


@pytest.mark.parametrize(
    ('hidden', 'words'),
    [
        ('mmengine', 'slope_mm needs mmengine, which is not installed'),
        pytest.param('pkg_resources', 'mmengine needs pkg_resources', marks=OPENMMLAB_ALONE),
        ('mmcv', 'slope_mm needs mmcv, which is not installed'),
        ('mmdet', 'slope_mm needs mmdet, which is not installed'),
    ],
)
def test_import_without_a_package_says_what_to_do(hidden: str, words: str, tmp_path: Path) -> None:
    message = import_problem(hide(tmp_path, hidden))
    assert message.startswith(words)
    assert re.search(r'; mend it with: (make setup|python -m pip install )', message)


def test_submodules_say_it_as_well(tmp_path: Path) -> None:
    command = 'import slope_mm\nfrom slope_mm.engine import launch'
    result = run_python('-c', command, first_on_path=hide(tmp_path, 'mmdet'))
    last = result.stderr.splitlines()[-1]
    assert last.startswith('slope_mm.errors.EnvironmentProblem: slope_mm needs mmdet')


def test_program_ends_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    hidden = hide(tmp_path, 'mmcv._ext')
    result = run_python('-m', 'slope_mm.environment', first_on_path=hidden)
    assert result.returncode == 1
    assert result.stderr.startswith('slope_mm needs mmcv with its compiled operators')
    assert result.stderr.count('\n') == 1
    assert 'mend it with: ' in result.stderr
    assert re.search(r'^python +3\.', result.stdout), 'the versions are shown all the same'


@pytest.mark.skipif(sys.platform != 'linux', reason='edits an ELF file')
def test_operators_of_another_torch(tmp_path: Path) -> None:
    library = next(copy_of_mmcv(tmp_path).glob('_ext*.so'))
    content = library.read_bytes()
    # A name that only another torch exports: what a build against it would ask for.
    name = re.search(rb'\0(_ZN2at4_ops[^\0]+)\0', content).group(1)
    library.write_bytes(content.replace(b'\0' + name + b'\0', b'\0' + name[:-1] + b'Z\0'))
    message = import_problem(tmp_path)
    assert 'built for another torch' in message
    assert 'undefined symbol' in message


@OPENMMLAB_ALONE
def test_mmcv_that_mmdet_refuses(tmp_path: Path) -> None:
    version = copy_of_mmcv(tmp_path) / 'version.py'
    version.write_text(version.read_text().replace('2.1.0', '2.2.0'))
    message = import_problem(tmp_path)
    assert re.match(r'mmdet \S+ refuses the installed mmcv \(MMCV==2\.2\.0 is used', message)


def test_errors_of_other_kinds_are_left_as_they_are(tmp_path: Path) -> None:
    package = copy_of_mmcv(tmp_path)
    (package / 'version.py').write_text('raise ZeroDivisionError("a bug of its own")')
    result = run_python('-c', 'import slope_mm', first_on_path=tmp_path)
    assert result.stderr.splitlines()[-1] == 'ZeroDivisionError: a bug of its own'


@pytest.mark.parametrize('library', ['libGL.so.1', 'libgthread-2.0.so.0', 'libxcb.so.1'])
def test_what_a_server_lacks_for_opencv_is_mended_by_its_build_without_windows(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'prefix', '/opt/somewhere-else')
    error = ImportError(f'{library}: cannot open shared object file: No such file or directory')
    assert 'opencv-python-headless' in environment._install_command('mmengine', error)


def test_command_for_an_environment_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'prefix', '/opt/somewhere-else')
    command = environment.mmcv_build_command()
    assert 'MMCV_WITH_OPS=1 python -m pip install --no-build-isolation --no-cache-dir' in command
    assert command.index('setuptools<82') < command.index('MMCV_WITH_OPS')


# --- the set-up ------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, as far as the set-up looks at it before it begins."""
    folder = tmp_path / 'clone'
    (folder / 'tools').mkdir(parents=True)
    files = ('Makefile', 'requirements.txt', 'requirements-onedl.txt', 'setup.cfg')
    for name in (*files, 'tools/setup_env.py'):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / 'tools/setup_steps', folder / 'tools/setup_steps')
    return folder


def load_setup(clone: Path, room: str = 'setup_env') -> ModuleType:
    """The set-up of one clone, or a room of it; those of other clones are forgotten."""
    for name in [n for n in sys.modules if n.split('.')[0] in ('setup_env', 'setup_steps')]:
        del sys.modules[name]
    sys.path.insert(0, str(clone / 'tools'))
    try:
        return importlib.import_module(room)
    finally:
        sys.path.remove(str(clone / 'tools'))


def make(
    clone: Path, *arguments: str, programs: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run make where nothing but the given programs can be found."""
    folder = clone.parent / 'bin'
    folder.mkdir(exist_ok=True)
    for name, target in programs.items():
        (folder / name).symlink_to(target)
    return subprocess.run(
        [shutil.which('make'), *arguments],
        cwd=clone,
        env={'PATH': str(folder), 'HOME': str(clone.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=20,
    )


def base_python() -> str:
    return str(Path(sys.base_prefix, 'bin', 'python{}.{}'.format(*sys.version_info)))


@pytest.mark.parametrize('target', ['setup', 'demo', 'test', 'test-onedl', 'test-oldest'])
def test_missing_compiler_is_named_in_the_first_line(target: str, clone: Path) -> None:
    result = make(clone, target, programs={'python3': base_python()})
    assert result.returncode != 0
    assert result.stdout.splitlines()[0] == (
        'slope_mm needs a C++ compiler: install g++ (Debian: apt-get install g++)'
        ' and run make again'
    )
    assert not list(clone.glob('.venv*'))


def test_missing_python_is_named_in_the_first_line(clone: Path) -> None:
    result = make(clone, 'setup', programs={})
    assert result.returncode != 0
    assert result.stdout.startswith("slope_mm needs Python 3.10 or newer, and 'python3' is none")
    assert not (clone / '.venv').exists()


def test_old_python_is_refused_in_the_first_line(clone: Path) -> None:
    # Answers as an old Python does to the one question that is asked of it.
    old = clone.parent / 'python2'
    old.write_text('#!/bin/sh\nexit 1\n')
    old.chmod(0o755)
    result = make(clone, 'demo', f'PYTHON={old}', programs={'python3': base_python()})
    assert result.returncode != 0
    assert result.stdout.startswith(f"slope_mm needs Python 3.10 or newer, and '{old}' is none")


def test_complete_environment_needs_nothing_until_what_it_was_made_from_changes(
    clone: Path,
) -> None:
    setup = load_setup(clone)
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.symlink_to(base_python())
    made_from = setup.fingerprint('torch==2.4.1')
    setup.write_state({'torch': 'torch==2.4.1', 'made_from': made_from})
    # There is no compiler, so that a set-up that starts can be told by its complaint.
    complete = make(clone, 'environment', programs={'python3': base_python()})
    assert (complete.returncode, complete.stdout) == (0, '')
    assert make(clone, 'environment', 'TORCH=torch==2.4.1', programs={}).returncode == 0

    other_torch = make(clone, 'environment', 'TORCH=torch==2.13.0', programs={})
    assert 'needs a C++ compiler' in other_torch.stdout
    for name in ('requirements.txt', 'setup.cfg', 'tools/setup_steps/stack.py'):
        before = (clone / name).read_text()
        (clone / name).write_text(before + '\n# changed\n')
        assert 'needs a C++ compiler' in make(clone, 'environment', programs={}).stdout, name
        (clone / name).write_text(before)
    assert make(clone, 'environment', programs={}).returncode == 0

    setup.write_state({'torch': 'torch==2.4.1'})  # as an interrupted set-up leaves it
    assert 'needs a C++ compiler' in make(clone, 'environment', programs={}).stdout


def test_a_clone_that_was_moved_is_set_up_anew(clone: Path) -> None:
    """The project lies in its environment as a path."""
    made_from = load_setup(clone).fingerprint('torch==2.4.1')
    assert load_setup(clone).fingerprint('torch==2.4.1') == made_from
    moved = clone.with_name('moved')
    shutil.copytree(clone, moved)
    assert load_setup(moved).fingerprint('torch==2.4.1') != made_from


def test_progress_is_read_from_the_last_line_of_ninja(clone: Path) -> None:
    setup = load_setup(clone, 'setup_steps.processes')
    log = clone / 'build.log'
    log.write_text('  running build_ext\n')
    assert setup.progress(log) == ''
    log.write_text('  [1/77] c++ -MMD a.cpp\n  a.cpp:3: warning: [9/9]\n  [23/77] c++ -MMD b.cpp\n')
    assert setup.progress(log) == ', 23 of 77 files compiled'


def test_failed_build_shows_the_complaint_of_the_compiler(clone: Path) -> None:
    setup = load_setup(clone, 'setup_steps.processes')
    log = clone / 'build.log'
    earlier = 'an earlier step: error: long mended\n'
    noise = ''.join(f'traceback {i}\n' for i in range(60))
    account = 'error: subprocess-exited-with-error\nfull command: python -c\n'
    log.write_text(f'{earlier}x.cpp:1: fatal error: no such header\n{noise}{account}')
    shown = setup.failure(log, begin=len(earlier)).splitlines()
    assert shown[0] == '  | x.cpp:1: fatal error: no such header'
    assert shown[-1] == '  | traceback 59'
    assert 'long mended' not in ''.join(shown)


def test_torch_of_numpy_1_times_keeps_numpy_1(clone: Path) -> None:
    setup = load_setup(clone)
    setup.VENV.mkdir()
    setup.write_constraints('2.13.0+cpu')
    assert 'torch==2.13.0+cpu' in setup.CONSTRAINTS.read_text().split()
    assert 'numpy<2' not in setup.CONSTRAINTS.read_text()
    setup.write_constraints('2.1.2')
    assert 'numpy<2' in setup.CONSTRAINTS.read_text().split()


def test_versions_named_in_messages_are_those_of_the_requirements(clone: Path) -> None:
    assert set(environment.OPENMMLAB.values()) <= set(load_setup(clone).requirements())


@pytest.mark.parametrize(
    ('stack', 'folder', 'mmcv', 'torch'),
    [
        ('', '.venv', 'mmcv==', 'torch==2.13.0'),
        ('onedl', '.venv-onedl', 'onedl-mmcv==', 'torch==2.13.0'),
        ('oldest', '.venv-oldest', 'mmcv==', 'torch==2.1.*'),
    ],
)
def test_each_stack_has_an_environment_of_its_own(
    stack: str, folder: str, mmcv: str, torch: str, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('SLOPE_STACK', stack)
    setup = load_setup(clone)
    assert clone / folder == setup.VENV
    assert [line for line in setup.requirements() if line.startswith(mmcv)]
    assert torch == setup.STACK.torch
    # The oldest torch is the one that setup.cfg promises.
    promised = 'torch>=2.1\n' in (clone / 'setup.cfg').read_text()
    assert promised or stack != 'oldest'


def test_an_unknown_stack_is_refused(clone: Path) -> None:
    done = subprocess.run(
        [sys.executable, clone / 'tools' / 'setup_env.py'],
        env={**os.environ, 'SLOPE_STACK': 'onedll'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == 'SLOPE_STACK=onedll is none of openmmlab, onedl, oldest\n'
