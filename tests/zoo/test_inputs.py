"""Dummy batches: what a model's own training data would bring."""

from __future__ import annotations

import pytest

from slope_mm.zoo.configs import stock_zoo_config
from slope_mm.zoo.inputs import training_batch
from slope_mm.zoo.trial import build, train_step


@pytest.mark.parametrize(
    ('name', 'masks'),
    [
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
        ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', False),
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', False),
        ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', True),
        # Its panoptic annotations bring masks by themselves.
        ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', True),
    ],
)
def test_a_model_gets_masks_where_its_training_data_have_them(name: str, masks: bool) -> None:
    batch = training_batch(stock_zoo_config(name), 64)
    for sample in batch['data_samples']:
        assert ('masks' in sample.gt_instances) == masks
        assert sample.gt_instances.bboxes.shape == (len(sample.gt_instances.labels), 4)


def test_a_config_without_training_data_is_given_masks() -> None:
    config = stock_zoo_config('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    config.pop('train_dataloader')
    assert all('masks' in s.gt_instances for s in training_batch(config, 64)['data_samples'])


def test_an_assigner_that_would_look_at_masks_trains_without() -> None:
    config = stock_zoo_config('rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    loss, reached = train_step(build(config), config, 64)
    assert loss > 0
    assert reached
