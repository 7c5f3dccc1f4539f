"""Families of the stock zoo in small: what the whole zoo is asked, on narrow backbones."""

from __future__ import annotations

from typing import Any

import pytest
from zoo.small import small_config

from slope_mm.zoo.page import GOAL, accounted, complaints
from slope_mm.zoo.trial import try_config

FAMILIES = (
    'atss/atss_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
    'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'detr/detr_r50_8xb2-150e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'gfl/gfl_r50_fpn_1x_coco.py',
    'gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py',
    'htc/htc_r50_fpn_1x_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'reppoints/reppoints-moment_r50_fpn_1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'solo/solo_r50_fpn_1x_coco.py',
    'swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'tood/tood_r50_fpn_1x_coco.py',
    'yolox/yolox_nano_8xb8-300e_coco.py',
)


@pytest.mark.parametrize('name', FAMILIES, ids=[name.split('/')[1][:-3] for name in FAMILIES])
def test_a_family_trains_predicts_bakes_and_packs(name: str) -> None:
    found: dict[str, Any] = {}
    try_config(small_config(name), lambda **values: found.update(values))
    assert complaints(found) == []
    assert found['packed'] == 'equal'
    assert accounted(found) >= GOAL, found['dense_left']
    assert found['steps'] > 0
