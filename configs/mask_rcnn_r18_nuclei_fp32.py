# The start and schedule that all nuclei arms share: the model of `_scratch`, fine-tuned. Without
# a recipe this is the fp32 arm.
_base_ = [
    './_base_/models/mask_rcnn_r18_nuclei.py',
    './_base_/datasets/nuclei_instance.py',
    './_base_/schedules/small_finetune.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/runtime.py',
]
load_from = 'work_dirs/mask_rcnn_r18_nuclei_scratch/epoch_24.pth'
# 50 iterations an epoch.
train_cfg = dict(max_epochs=8, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=25),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=8,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
