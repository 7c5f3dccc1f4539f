# SLOPE: 2:4 sparsity, 4-bit weights, 4-bit activations, from the model of `_scratch`.
_base_ = [
    './_base_/models/retinanet_r18_small.py',
    './_base_/datasets/shapes_instance.py',
    './_base_/schedules/small_finetune.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/recipes/slope_w4a4.py',
    './_base_/runtime.py',
]
val_evaluator = dict(metric='bbox')
test_evaluator = dict(metric='bbox')
model = dict(type='slope_mm.SlopeModel', arch='RetinaNet', recipe=_base_.recipe)
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=_base_.regularizer
)
custom_hooks = _base_.slope_hooks
load_from = 'work_dirs/retinanet_r18_shapes_scratch/epoch_12.pth'
