"""Detectors that the tests export: small, calibrated, on shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch
from mmengine.config import Config
from torch import nn

from slope_mm.engine.calibration import observing
from slope_mm.export.images import image_batches
from slope_mm.export.parts import capture_inputs

RETINA_HEAD = dict(
    type='RetinaHead',
    num_classes=5,
    in_channels=16,
    stacked_convs=1,
    feat_channels=16,
    anchor_generator=dict(
        type='AnchorGenerator',
        octave_base_scale=4,
        scales_per_octave=1,
        ratios=[1.0],
        strides=[4, 8, 16, 32],
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
)


def faster_rcnn(config: Config) -> Config:
    """A config without its masks."""
    config = copy.deepcopy(config)
    config.model.arch = 'FasterRCNN'
    for key in ('mask_head', 'mask_roi_extractor'):
        config.model.roi_head.pop(key)
    return _boxes_alone(config)


def retinanet(config: Config) -> Config:
    """The same backbone and neck under a RetinaNet's head."""
    config = copy.deepcopy(config)
    model = config.model
    for key in ('rpn_head', 'roi_head', 'train_cfg', 'test_cfg'):
        model.pop(key)
    model.update(
        arch='RetinaNet',
        bbox_head=RETINA_HEAD,
        test_cfg=dict(
            nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20
        ),
    )
    return _boxes_alone(config)


def _boxes_alone(config: Config) -> Config:
    for key in ('val_evaluator', 'test_evaluator'):
        config[key].metric = ['bbox']
    return config


def calibrated(config: Config) -> nn.Module:
    """A detector of a config with random weights, calibrated on test images."""
    model = tiny.build(config).eval()
    with observing(model):
        for batch in image_batches(config, 2):
            capture_inputs(model, batch)
    return model


def save(model: nn.Module, path: Path) -> Path:
    """As a checkpoint."""
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    return path


def predictions(model: Any, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        found = model.test_step(copy.deepcopy(batch))
    return [dict(sample.pred_instances.items()) for sample in found]
