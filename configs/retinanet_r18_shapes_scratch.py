# A stock RetinaNet for the shapes, trained from scratch; five pyramid levels share its head.
_base_ = [
    './_base_/models/retinanet_r18_small.py',
    './_base_/datasets/shapes_instance.py',
    './_base_/schedules/small_dense.py',
    './_base_/schedules/slope_hooks.py',
    './_base_/runtime.py',
]
val_evaluator = dict(metric='bbox')
test_evaluator = dict(metric='bbox')
