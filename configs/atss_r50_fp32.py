# The start that both arms share: mmdet's published ATSS (box 39.4 on COCO val2017),
# fine-tuned by the schedule it was trained with, at a quarter of its learning rate.
_base_ = [
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    './_base_/schedules/slope_hooks.py',
]
# All layers learn: a frozen stage would keep the compressed weights that it starts with.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=0.0025), clip_grad=dict(max_norm=35, norm_type=2))
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/atss/atss_r50_fpn_1x_coco/atss_r50_fpn_1x_coco_20200209-985f7bd0.pth'
