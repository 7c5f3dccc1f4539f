# The L2 arm: 2:4 sparsity, 4-bit weights, relative L2 instead of cosine, on COCO.
_base_ = ['./mask_rcnn_r50_fp32.py', './_base_/recipes/l2_w4.py']
model = dict(type='slope_mm.SlopeModel', arch='MaskRCNN', recipe=_base_.recipe)
# lambda for this schedule's SGD is calculated, not measured: docs/method.md.
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=dict(type='l2', weight=10.0)
)
custom_hooks = _base_.slope_hooks
