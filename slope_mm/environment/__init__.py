"""What slope_mm needs of the environment: versions, and clear words where something is unusable.

`check_environment` runs whenever slope_mm is imported. `python -m slope_mm.environment` prints the
versions and puts mmcv's compiled operators to the proof.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from slope_mm.errors import EnvironmentProblem

__all__ = ['check_environment', 'version_table']

#: What to install where a module is missing; requirements.txt says the same.
OPENMMLAB = {'mmengine': 'mmengine==0.10.7', 'mmcv': 'mmcv==2.1.0', 'mmdet': 'mmdet==3.3.0'}
#: The maintained forks: other distributions, the same import names.
ONEDL = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv', 'mmdet': 'onedl-mmdetection'}


def check_environment() -> None:
    """Make sure that mmengine, mmcv with its compiled operators, and mmdet can be used.

    Costs little more than the imports of these packages. Where the interpreter was started as
    `python -m slope_mm.environment`, which imports the package first, a problem ends the program
    with the versions and one line instead of a traceback.

    Raises:
        EnvironmentProblem: One of them is missing or unusable. The message says which, why, and
            the command that mends it. Other errors inside these packages are left as they are.
    """
    try:
        _check_mmengine()
        _check_mmcv()
        _check_mmdet()
    except EnvironmentProblem as problem:
        if not _started_as_program():
            raise
        print(version_table(), flush=True)
        print(problem, file=sys.stderr)
        raise SystemExit(1) from None


def version_table() -> str:
    """Describe machine and packages, one name and version per line."""
    rows = {
        'python': f'{platform.python_version()} ({sys.executable})',
        'platform': platform.platform(),
        'cores': str(usable_cores()),
        'torch': _installed('torch'),
        'CUDA': _cuda(),
    }
    for name in ('numpy', 'mmengine', 'mmcv', 'mmdet', 'pycocotools', 'slope_mm'):
        rows[name] = _installed(name)
    return '\n'.join(f'{name:<16}{value}' for name, value in rows.items())


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def mmcv_build_command() -> str:
    """The command that builds mmcv with its operators against the installed torch."""
    options = '--no-build-isolation'
    if _version_of('mmcv') is not None:
        # pip's cache does not know for which torch a wheel was built.
        options += ' --no-cache-dir --force-reinstall --no-deps'
    return _mending_command(
        'python -m pip install "setuptools<82" wheel ninja && MMCV_WITH_OPS=1 python -m pip install'
        f' {options} "{_requirement("mmcv")}"'
    )


def _check_mmengine() -> None:
    _import('mmengine')
    # OpenMMLab's mmengine resolves `mmdet::` config bases with pkg_resources; the fork does not.
    needs_pkg_resources = _version('mmengine') is not None
    if needs_pkg_resources and importlib.util.find_spec('pkg_resources') is None:
        raise EnvironmentProblem(
            f'mmengine needs pkg_resources, which setuptools {_installed("setuptools")} does not'
            f' have; mend it with: {_mending_command(_pip_install("setuptools<82"))}'
        )


def _check_mmcv() -> None:
    _import('torch')
    _import('mmcv')
    try:
        importlib.import_module('mmcv._ext')
    except ModuleNotFoundError as error:
        if error.name != 'mmcv._ext':
            raise
        raise EnvironmentProblem(
            'slope_mm needs mmcv with its compiled operators, and the installed one has none;'
            f' mend it with: {mmcv_build_command()}'
        ) from error
    except ImportError as error:
        raise EnvironmentProblem(
            "mmcv's compiled operators cannot be loaded, as happens when they were built for"
            f' another torch than the installed {_installed("torch")} ({_first_line(error)});'
            f' mend it with: {mmcv_build_command()}'
        ) from error


def _check_mmdet() -> None:
    try:
        _import('mmdet')
    except AssertionError as error:  # mmdet's own check of mmcv's and mmengine's versions
        culprit = 'mmengine' if 'mmengine' in str(error).lower() else 'mmcv'
        command = (
            mmcv_build_command()
            if culprit == 'mmcv'
            else _mending_command(_pip_install(_requirement(culprit)))
        )
        raise EnvironmentProblem(
            f'mmdet {_installed("mmdet")} refuses the installed {culprit}'
            f' ({_first_line(error)}); mend it with: {command}'
        ) from error


def _import(name: str) -> None:
    """Import one of the packages that slope_mm builds on, or say why that is impossible."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            reason = f'slope_mm needs {name}, which is not installed'
        else:
            reason = f'slope_mm needs {name}, which cannot be imported ({_first_line(error)})'
        raise EnvironmentProblem(
            f'{reason}; mend it with: {_install_command(name, error)}'
        ) from error


def _install_command(name: str, error: ImportError) -> str:
    if re.search(r'lib(GL|glib|gthread|xcb|X11|SM|ICE)\b', str(error)):
        # OpenCV's usual build draws windows; a server without a display has no libraries for that.
        # Same files without the windows, laid over it so that mmcv's requirement stays met.
        version = _version('opencv-python')
        headless = 'opencv-python-headless' + (f'=={version}' if version else '')
        return _mending_command(f'{_pip_install(headless)} --no-deps --force-reinstall')
    if name == 'mmcv' and _version_of('mmcv') is None:
        return mmcv_build_command()
    return _mending_command(_pip_install(_requirement(name)))


def _mending_command(otherwise: str) -> str:
    """`make setup` in a clone's own .venv, as it mends all of this; else the command given."""
    root = Path(__file__).parents[2]
    is_clone = (root / 'tools' / 'setup_env.py').is_file()
    is_own = Path(sys.prefix).resolve() == (root / '.venv').resolve()
    return 'make setup' if is_clone and is_own else otherwise


def _pip_install(requirement: str) -> str:
    return f'python -m pip install "{requirement}"'


def _requirement(name: str) -> str:
    """What pip should install for a module, of the family whose packages are already here."""
    forked = any(_version(distribution) for distribution in ONEDL.values())
    return (ONEDL if forked else OPENMMLAB).get(name, name)


def _version_of(name: str) -> str | None:
    """The installed version behind an import name, OpenMMLab's or the fork's."""
    return _version(name) or (_version(ONEDL[name]) if name in ONEDL else None)


def _installed(name: str) -> str:
    fork = ONEDL.get(name, '')
    if _version(name) is None and fork and _version(fork):
        return f'{_version(fork)} ({fork})'
    return _version(name) or 'not installed'


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> str:
    try:
        import torch
    except ImportError:
        return 'unknown without torch'
    if torch.version.cuda is None:
        return 'none (torch is a CPU build)'
    if not torch.cuda.is_available():
        return f'{torch.version.cuda}, no GPU to be seen'
    return f'{torch.version.cuda}, {torch.cuda.get_device_name(0)}'


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')


def _started_as_program() -> bool:
    """Whether `python -m slope_mm.environment` is on its way to that module."""
    # argv[0] is '-m' only while the interpreter still looks for the module to run.
    wanted = (__name__, f'-m{__name__}')
    return sys.argv[:1] == ['-m'] and any(argument in wanted for argument in sys.orig_argv)
