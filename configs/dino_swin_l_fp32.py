# The start that both arms share: mmdet's published DINO with Swin-L (box 57.2 on COCO val2017),
# fine-tuned for another 12 epochs at half its learning rate.
_base_ = [
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    './_base_/schedules/slope_hooks.py',
]
model = dict(backbone=dict(init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth'
