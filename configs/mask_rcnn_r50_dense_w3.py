# Dense low-bit: 3-bit weights, no sparsity, no regularizer, on COCO.
_base_ = ['./mask_rcnn_r50_fp32.py', './_base_/recipes/dense_w3.py']
model = dict(type='slope_mm.SlopeModel', arch='MaskRCNN', recipe=_base_.recipe)
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=_base_.regularizer
)
custom_hooks = _base_.slope_hooks
