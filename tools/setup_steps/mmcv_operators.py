"""mmcv with operators that belong to the installed torch, and OpenCV without windows."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from setup_steps.processes import (
    installed_version,
    minutes_since,
    pip_install,
    run,
    runs,
    say,
    venv_python_version,
)
from setup_steps.stack import (
    MMCV_LOG,
    PROOF,
    PYTHON,
    SETUP_LOG,
    STACK,
    VENV,
    SetupError,
    requirements,
)

#: -O2 without debug symbols halves the compile time of mmcv; its operators stay as fast.
COMPILER_FLAGS = '-O2 -g0'


def compiler() -> str | None:
    """The C++ compiler to use: the one that CXX names, or the first of the usual ones."""
    named = os.environ.get('CXX', '').split()
    candidates = named[:1] or ['c++', 'g++', 'clang++']
    return next((name for name in candidates if shutil.which(name)), None)


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
