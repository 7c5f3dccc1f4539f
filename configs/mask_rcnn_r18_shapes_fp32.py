# The start and schedule that all shapes arms share: the model of `_scratch`, fine-tuned. Without
# a recipe this is the fp32 arm.
_base_ = [
    './_base_/models/mask_rcnn_r18_small.py',
    './_base_/datasets/shapes_instance.py',
    './_base_/schedules/small_finetune.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/runtime.py',
]
load_from = 'work_dirs/mask_rcnn_r18_shapes_scratch/epoch_12.pth'
