# The dense model that all nuclei arms start from, trained from scratch.
_base_ = [
    './_base_/models/mask_rcnn_r18_nuclei.py',
    './_base_/datasets/nuclei_instance.py',
    './_base_/schedules/small_dense.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/runtime.py',
]
# 50 iterations an epoch.
train_cfg = dict(max_epochs=24, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=24,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
