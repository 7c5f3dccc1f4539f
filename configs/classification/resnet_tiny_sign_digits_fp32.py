# The start and the schedule that all arms of the tiny ResNet share: the model of `_scratch`,
# fine-tuned. Without a recipe this is the fp32 arm.
_base_ = [
    '../_base_/models/resnet_tiny_classifier.py',
    '../_base_/datasets/sign_digits.py',
    '../_base_/schedules/classifier_finetune.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
load_from = 'work_dirs/resnet_tiny_sign_digits_scratch/epoch_30.pth'
