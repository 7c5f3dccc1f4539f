"""Fixtures of the tests that run mmengine: data, and runs that several tests look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from mmengine.config import Config

from slope_mm.datasets.shapes import ShapesPaths, make_shapes

# Runs that are compared with each other, in this process and in others, compute alike.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='-1')


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
