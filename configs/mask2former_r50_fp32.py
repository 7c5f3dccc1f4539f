# The start that both arms share: mmdet's published Mask2Former (box 45.7, mask 42.9 on COCO
# val2017),
# fine-tuned for 46,000 iterations at half its learning rate.
_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    './_base_/schedules/slope_hooks.py',
]
# All layers learn: a frozen stage would keep the compressed weights that it starts with.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
# An eighth of the schedule that it was trained with.
train_cfg = dict(max_iters=46000, val_interval=5000, dynamic_intervals=[(45001, 46000)])
param_scheduler = dict(end=46000, milestones=[40000, 44000])
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_r50_8xb2-lsj-50e_coco/mask2former_r50_8xb2-lsj-50e_coco_20220506_191028-41b088b6.pth'
