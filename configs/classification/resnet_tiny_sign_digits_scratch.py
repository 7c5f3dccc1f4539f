# The dense model that all arms of the tiny ResNet start from.
_base_ = [
    '../_base_/models/resnet_tiny_classifier.py',
    '../_base_/datasets/sign_digits.py',
    '../_base_/schedules/classifier_dense.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
