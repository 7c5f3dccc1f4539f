"""Mutated checkpoints: read, or refused with a CheckpointError; nothing else happens.

``SLOPE_FUZZ=20000`` makes that many mutated files instead of a few hundred.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pickle_gadgets import read_pickle, write_pickle

from slope_mm import CheckpointError
from slope_mm.engine.checkpoint import load_checkpoint_file

pytestmark = pytest.mark.usefixtures('installed')
MUTATIONS = int(os.environ.get('SLOPE_FUZZ', '200'))


def mutated(content: bytes, random: Any) -> bytes:
    """A few bytes changed, removed, or put where others were; or the end cut off."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(data)))
        kind = random.integers(5)
        if kind == 0:
            data[at] = int(random.integers(256))
        elif kind == 1:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            del data[at : at + int(random.integers(1, 9))]
        elif kind == 3:
            start = int(random.integers(len(data)))
            data[at:at] = data[start : start + int(random.integers(1, 65))]
        elif random.integers(8) == 0:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize('part', ['file', 'pickle'])
def test_a_mutated_checkpoint(part: str, trained: Path, tmp_path: Path) -> None:
    """Of the whole file, and of the pickle in an archive that is sound otherwise."""
    random = np.random.default_rng(0)
    path = tmp_path / 'mutated.pth'
    whole, pickled = trained.read_bytes(), read_pickle(trained)
    folder = set(tmp_path.iterdir()) | {path}
    refused = 0
    for number in range(MUTATIONS):
        if part == 'file':
            path.write_bytes(mutated(whole, random) or b'\0')
        else:
            path.write_bytes(whole)
            write_pickle(path, mutated(pickled, random))
        try:
            load_checkpoint_file(path)
        except CheckpointError:
            refused += 1
        except Exception as error:
            raise AssertionError(f'mutation {number}') from error
    assert set(tmp_path.iterdir()) == folder
    assert refused > MUTATIONS / 10
