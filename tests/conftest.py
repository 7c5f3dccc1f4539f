"""What the tests that run mmengine share: a small shapes set, and a config shrunk to fit it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from slope_mm.datasets.shapes import ShapesPaths, make_shapes

CONFIGS = Path(__file__).parents[1] / 'configs'
IMAGE_SIZE = 64

# Runs that are compared with each other, in this process and in others, compute alike.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'

_numbers = itertools.count()


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    """A shapes set of eight training and four validation images."""
    return make_shapes(
        tmp_path_factory.mktemp('data') / 'shapes',
        num_train=8,
        num_val=4,
        image_size=IMAGE_SIZE,
        object_size=(20, 40),
        max_objects=3,
    )


@pytest.fixture(scope='session')
def tiny_config(shapes: ShapesPaths) -> Callable[..., Config]:
    """Makes configs of this project that train a very small Mask R-CNN in a second."""

    def make(
        work_dir: Path | str,
        name: str = 'mask_rcnn_r18_shapes_slope_w4a4',
        epochs: int = 1,
        **options: Any,
    ) -> Config:
        """Shrinks ``configs/NAME.py``: two iterations an epoch, four images of 64 px each.

        Args:
            work_dir: The run's work directory.
            name: Config name without ending.
            epochs: Length of training.
            **options: What else is different, by key; ``__`` stands for the dots of nested keys.
        """
        config = Config.fromfile(CONFIGS / f'{name}.py')
        config.load_from = None
        config.work_dir = str(work_dir)
        config.merge_from_dict({'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': epochs})
        config.train_dataloader.batch_size = 4
        _use_data(config, shapes)
        _shrink_model(config.model)
        config.param_scheduler = [
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)
        ]
        config.default_hooks.logger.interval = 1
        config.log_processor.window_size = 1
        for hook in config.custom_hooks:
            if hook.type == 'slope_mm.SlopeCalibrationHook':
                hook.batches = 1
            if hook.type == 'slope_mm.SlopeMonitorHook':
                hook.interval = 1
        config.merge_from_dict({key.replace('__', '.'): v for key, v in options.items()})
        name_run(config)
        return config

    return make


def name_run(config: Config) -> Config:
    """Gives a run names of its own: mmengine keeps loggers and visualizers by name."""
    number = next(_numbers)
    config.experiment_name = f'run_{number}'
    config.visualizer.name = f'visualizer_{number}'
    return config


def _use_data(config: Config, shapes: ShapesPaths) -> None:
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = config[loader].dataset
        dataset.data_root = f'{shapes.root}/'
        for step in dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (IMAGE_SIZE, IMAGE_SIZE)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        config[evaluator].ann_file = str(shapes.val_annotations)


def _shrink_model(model: Any) -> None:
    model.backbone.base_channels = 8
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32)
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)


def read_scalars(work_dir: Path | str) -> list[dict[str, Any]]:
    """The newest run's ``vis_data/scalars.json``: one row an iteration or evaluation."""
    newest = max(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in newest.read_text().splitlines()]
