# The start and the schedule that all R50 arms share: mmdet's published Mask R-CNN (box 40.9, mask
# 37.1 on COCO val2017), fine-tuned for 12 epochs. Without a recipe this is the fp32 arm.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_ms-poly-3x_coco.py',
    './_base_/schedules/slope_hooks.py',
]
# All layers learn: a frozen stage would keep the compressed weights that it starts with.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
# Every image once an epoch, instead of three times.
train_dataloader = dict(dataset=dict(times=1))
train_cfg = dict(max_epochs=12)
optim_wrapper = dict(optimizer=dict(lr=0.005), clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=12, eta_min=5e-5, convert_to_iter_based=True
    ),
]
randomness = dict(seed=0)
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_mstrain-poly_3x_coco/mask_rcnn_r50_fpn_mstrain-poly_3x_coco_20210524_201154-21b550bb.pth'
