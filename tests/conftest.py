"""Fixtures of the tests that run mmengine: data, runs that several tests look at, packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import tiny
import torch
from mmengine.config import Config

from slope_mm.datasets.shapes import ShapesPaths, make_shapes

# Runs that are compared with each other, in this process and in others, compute alike.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS='1')
# What a GPU computes differs in the last digits; tests that need one say so.
if os.environ.get('SLOPE_TESTS_ON') != 'cuda':
    os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    """A shapes set of eight training and four validation images."""
    return make_shapes(
        tmp_path_factory.mktemp('data') / 'shapes',
        num_train=8,
        num_val=4,
        image_size=tiny.IMAGE_SIZE,
        object_size=(20, 40),
        max_objects=3,
    )


@pytest.fixture(scope='session')
def tiny_config(shapes: ShapesPaths) -> Callable[..., Config]:
    """:func:`tiny.tiny_config` on the shapes set."""
    return partial(tiny.tiny_config, shapes)


@pytest.fixture(scope='session')
def dense_run(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> tiny.Run:
    """A stock Mask R-CNN after an epoch: where compressed runs start from."""
    work_dir = tmp_path_factory.mktemp('dense')
    return tiny.train(tiny_config(work_dir, 'mask_rcnn_r18_shapes_scratch'))


@pytest.fixture(scope='session')
def slope_run(
    dense_run: tiny.Run,
    tiny_config: Callable[..., Config],
    tmp_path_factory: pytest.TempPathFactory,
) -> tiny.Run:
    """A SLOPE W4A4 fine-tuning of it: an epoch, evaluated and saved, with the monitor's picture."""
    config = tiny_config(tmp_path_factory.mktemp('slope'), load_from=str(dense_run.checkpoint))
    config.custom_hooks[-1].picture = True
    return tiny.train(config)


@pytest.fixture(scope='session')
def weight_run(
    dense_run: tiny.Run,
    tiny_config: Callable[..., Config],
    tmp_path_factory: pytest.TempPathFactory,
) -> tiny.Run:
    """A fine-tuning of the dense run with compressed weights alone."""
    work_dir = tmp_path_factory.mktemp('weight_only')
    name = 'mask_rcnn_r18_shapes_slope_w4'
    return tiny.train(
        tiny_config(work_dir, name, validate=False, load_from=str(dense_run.checkpoint))
    )


# Operators of torchvision's that its import looks for, and that a build for CUDA lacks beside a
# torch for CPUs.
SCHEMAS = {
    'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
_library: torch.library.Library | None = None


def _import_torchvision() -> None:
    """Imports torchvision.

    Where it is a build for CUDA and torch one for CPUs, the import fails for two missing operators.
    Their schemas are enough: no model calls them.
    """
    global _library
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


@pytest.fixture(scope='session')
def mmpretrain() -> ModuleType:
    """mmpretrain; tests that need it are skipped where it is not installed."""
    if importlib.util.find_spec('mmpretrain') is None:
        pytest.skip("mmpretrain is not installed (the extra 'classification' brings it)")
    _import_torchvision()
    return importlib.import_module('mmpretrain')


@pytest.fixture(scope='session')
def mmseg() -> ModuleType:
    """mmseg; tests that need it are skipped where it is not installed."""
    if importlib.util.find_spec('mmseg') is None:
        pytest.skip('mmseg is not installed (the package mmsegmentation)')
    return importlib.import_module('mmseg')
