# The start that both arms share: mmdet's published Mask2Former with Swin-T (box 47.7, mask 44.7
# on COCO val2017),
# fine-tuned for 46,000 iterations at half its learning rate.
_base_ = [
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    './_base_/schedules/slope_hooks.py',
]
model = dict(backbone=dict(init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
# An eighth of the schedule that it was trained with.
train_cfg = dict(max_iters=46000, val_interval=5000, dynamic_intervals=[(45001, 46000)])
param_scheduler = dict(end=46000, milestones=[40000, 44000])
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco_20220508_091649-01b0f990.pth'
