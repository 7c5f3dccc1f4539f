"""The reader where numpy and safetensors are all that is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_golden import CASES, GOLDEN

from slope_mm.packing import read_packed

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path.insert(0, {path!r})
import slope_mm
from slope_mm.packing import read_packed
assert slope_mm.read_packed is read_packed
weights = read_packed({file!r})
import numpy
numpy.savez({out!r}, **weights)
foreign = ('torch', 'mmengine', 'mmcv', 'mmdet', 'constriction')
absent = [name for name in foreign if name in sys.modules]
assert absent == [], absent
try:
    slope_mm.convert
except slope_mm.EnvironmentProblem as problem:
    print(problem)
try:
    read_packed({broken!r})
except slope_mm.PackedFileError as error:
    print(error)
"""


@pytest.fixture(scope='module')
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the two packages and this one, and nothing else."""
    folder = tmp_path_factory.mktemp('packages')
    for name in ('numpy', 'safetensors'):
        origin = Path(importlib.util.find_spec(name).origin).parent
        for path in (origin, origin.with_name('numpy.libs')):
            if path.exists() and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    (folder / 'slope_mm').symlink_to(ROOT / 'slope_mm')
    return folder


@pytest.mark.parametrize('name', CASES)
def test_reading_with_numpy_and_safetensors_alone(
    name: str, packages: Path, tmp_path: Path
) -> None:
    """Entropy-coded files too: by numpy, where constriction is not there."""
    file, out, broken = GOLDEN / f'{name}.slope', tmp_path / 'out.npz', tmp_path / 'broken.slope'
    broken.write_bytes(file.read_bytes()[:-1])
    program = PROGRAM.format(path=str(packages), file=str(file), out=str(out), broken=str(broken))
    # Neither site-packages nor the environment's variables.
    done = subprocess.run(
        [sys.executable, '-I', '-S', '-c', program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    problem, error = done.stdout.splitlines()
    assert problem.startswith('slope_mm needs mmengine, which is not installed')
    assert str(broken) in error
    wanted = read_packed(file)
    with np.load(out) as found:
        assert found.files == list(wanted)
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
