# The start that both arms share: mmdet's published Faster R-CNN (box 38.4 on COCO val2017),
# fine-tuned by the schedule it was trained with, at a quarter of its learning rate.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    './_base_/schedules/slope_hooks.py',
]
# All layers learn: a frozen stage would keep the compressed weights that it starts with.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=0.005), clip_grad=dict(max_norm=35, norm_type=2))
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth'
