"""Fixtures: a few images in folders."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope='session')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``{train,val}/{0..9}/*.png``: eight and two images a class, brighter with the class."""
    root = tmp_path_factory.mktemp('images')
    noise = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 2)):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                image = noise.integers(0, 40, (32, 32, 3)) + 20 * label
                cv2.imwrite(str(folder / f'{number}.png'), image.astype(np.uint8))
    return root
