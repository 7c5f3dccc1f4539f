# The dense model that all arms of ResNet-18 start from.
_base_ = [
    '../_base_/models/resnet18_classifier.py',
    '../_base_/datasets/sign_digits.py',
    '../_base_/schedules/classifier_dense.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
# Half the epochs of the tiny ResNet.
train_cfg = dict(max_epochs=15, val_interval=15)
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=15,
        eta_min=1e-4,
        convert_to_iter_based=True,
    ),
]
