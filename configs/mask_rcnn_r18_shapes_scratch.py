# The dense model that all shapes arms start from, trained from scratch.
_base_ = [
    './_base_/models/mask_rcnn_r18_small.py',
    './_base_/datasets/shapes_instance.py',
    './_base_/schedules/small_dense.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/runtime.py',
]
