# The start that both arms share: mmdet's published Cascade Mask R-CNN (box 41.9, mask 36.5 on
# COCO val2017),
# fine-tuned by the schedule it was trained with, at a quarter of its learning rate.
_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    './_base_/schedules/slope_hooks.py',
]
# All layers learn: a frozen stage would keep the compressed weights that it starts with.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=0.005), clip_grad=dict(max_norm=35, norm_type=2))
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_mask_rcnn_r50_fpn_20e_coco/cascade_mask_rcnn_r50_fpn_20e_coco_bbox_mAP-0.419__segm_mAP-0.365_20200504_174711-4af8e66e.pth'
