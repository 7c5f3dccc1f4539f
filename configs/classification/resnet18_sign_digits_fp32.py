# The start and the schedule that all arms of ResNet-18 share: the model of `_scratch`,
# fine-tuned. Without a recipe this is the fp32 arm.
_base_ = [
    '../_base_/models/resnet18_classifier.py',
    '../_base_/datasets/sign_digits.py',
    '../_base_/schedules/classifier_finetune.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
load_from = 'work_dirs/resnet18_sign_digits_scratch/epoch_15.pth'
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=3, eta_min=1e-4, convert_to_iter_based=True
    ),
]
