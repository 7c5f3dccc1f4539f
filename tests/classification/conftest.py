"""Fixtures: a few images in folders, and mmpretrain where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

# Operators of torchvision's that its import looks for, and that a build for CUDA lacks beside a
# torch for CPUs.
SCHEMAS = {
    'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
_library: torch.library.Library | None = None


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


@pytest.fixture(scope='session')
def mmpretrain() -> ModuleType:
    """mmpretrain; tests that need it are skipped where it is not installed.

    Where torchvision is a build for CUDA and torch one for CPUs, the import fails for two missing
    operators. Their schemas are enough: no classifier calls them.
    """
    global _library
    if importlib.util.find_spec('mmpretrain') is None:
        pytest.skip("mmpretrain is not installed (the extra 'classification' brings it)")
    try:
        importlib.import_module('torchvision')
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        _library = torch.library.Library('torchvision', 'DEF')
        for name, schema in SCHEMAS.items():
            _library.define(name + schema)
    return importlib.import_module('mmpretrain')
