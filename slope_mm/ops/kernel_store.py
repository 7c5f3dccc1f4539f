"""Kernels that torch's compiler made ahead of time: built once on a machine, kept on disk, loaded.

The code of :mod:`slope_mm.ops.kernel_code` is exported and compiled by AOTInductor in a process of
its own, so that nothing of the compiler is imported where training runs; what comes out is a
library that loads in milliseconds. A folder of the user's cache keeps it
(``~/.cache/slope_mm``, or what ``SLOPE_CACHE`` names) under a name made of all that it depends on:
torch, the processor's instructions, and the code itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Kernel = Callable[[Sequence[Any]], Any]
# A name of kernel_code.EXAMPLES and the sizes that its function takes.
Name = tuple[Any, ...]

# A kernel takes ten to twenty seconds; a machine that is ten times slower still gets there.
_SECONDS = 600
_lock = threading.Lock()
_loaded: dict[Name, Kernel] = {}
_given_up: list[str] = []


def available() -> bool:
    """Whether kernels can be had, as far as is known: none failed to build so far."""
    return not _given_up


def cache_folder() -> Path:
    """Where kernels of this torch, processor and code are kept."""
    root = os.environ.get('SLOPE_CACHE')
    if not root:
        root = str(Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'slope_mm')
    return Path(root) / 'kernels' / _identity()


@functools.cache
def _identity() -> str:
    code = hashlib.sha256()
    for name in ('kernel_code.py', 'kernel_build.py', 'quantization.py', 'selection.py'):
        code.update(Path(__file__).with_name(name).read_bytes())
    code.update(' '.join((torch.__version__, platform.machine(), _instructions())).encode())
    return f'torch-{torch.__version__}-{code.hexdigest()[:16]}'


def _instructions() -> str:
    """What this processor can do: a library made for another one may crash here."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(('flags', 'Features')):
                return ' '.join(sorted(line.partition(':')[2].split()))
    return f'{platform.processor()} {torch.backends.cpu.get_cpu_capability()}'


def kernels(*names: Name) -> list[Kernel] | None:
    """Kernels of :data:`slope_mm.ops.kernel_code.EXAMPLES`, built first where they are missing.

    Args:
        *names: Their names and sizes. Those that have to be built are built side by side.

    Returns:
        One function for each, which takes the list of a kernel's inputs with nested lists
        flattened; None where there are no kernels to be had (a warning says why, once).
    """
    with contextlib.suppress(KeyError):
        return [_loaded[name] for name in names]
    with _lock:
        try:
            if not hasattr(getattr(torch._C, '_aoti', None), 'AOTIModelPackageLoader'):
                raise RuntimeError(f'torch {torch.__version__} cannot load them; 2.6 can')
            folder = cache_folder()
            files = [folder / f'{"-".join(map(str, name))}.pt2' for name in names]
            _build([file for file in files if not file.is_file()])
            for name, file in zip(names, files, strict=True):
                if name not in _loaded:
                    _loaded[name] = _load_or_rebuild(file)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _given_up.append(str(error))
            warnings.warn(
                f'SLOPE: there are no fused kernels here, so the plain passes do the work: {error}',
                stacklevel=2,
            )
            return None
    return [_loaded[name] for name in names]


def _load_or_rebuild(file: Path) -> Kernel:
    """A kernel of the cache; one that does not load (cut off, say) is built once more."""
    try:
        return _load(file)
    except RuntimeError:
        file.unlink(missing_ok=True)
        _build([file])
    try:
        return _load(file)
    except RuntimeError as error:
        raise RuntimeError(f"'{file}' does not load: {error}") from None


def _load(file: Path) -> Kernel:
    # torch._inductor.aoti_load_package wraps this loader, but imports the compiler for it, which
    # takes longer than all else, and flattens the inputs of each call in Python.
    loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), 'model', False, 1, -1)
    run: Kernel = loader.run
    return run


@contextlib.contextmanager
def _sole_builder(folder: Path) -> Iterator[None]:
    """Holds up other processes that would build the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(files: list[Path]) -> None:
    """Builds kernels in processes of their own, as many at once as there are cores."""
    if not files:
        return
    with _sole_builder(files[0].parent):
        missing = [file for file in files if not file.is_file()]
        at_once = os.cpu_count() or 1
        for start in range(0, len(missing), at_once):
            started = [_start(file) for file in missing[start : start + at_once]]
            try:
                for process in started:
                    _, errors = process.communicate(timeout=_SECONDS)
                    if process.returncode:
                        raise RuntimeError(_reason(errors))
            finally:
                for process in started:
                    process.kill()


def _reason(errors: str) -> str:
    """The line of a traceback that names the exception."""
    lines = errors.strip().splitlines() or ['the compiler gave no reason']
    named = [line for line in lines if re.match(r'[\w.]+(Error|Exception)\b', line)]
    return (named or lines)[-1]


def _start(file: Path) -> subprocess.Popen[str]:
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'PYTHONWARNINGS': 'ignore'}
    return subprocess.Popen(
        [sys.executable, '-m', 'slope_mm.ops.kernel_build', str(file)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
