# SLOPE: 2:4 sparsity, 4-bit weights, 4-bit activations, on COCO.
_base_ = ['./rtmdet_ins_s_fp32.py', './_base_/recipes/slope_w4a4.py']
model = dict(type='slope_mm.SlopeModel', arch='RTMDet', recipe=_base_.recipe)
# lambda as in the runs with AdamW (docs/method.md); no schedule was tuned for this model.
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor',
    regularizer=dict(type='cosine', weight=1.0),
)
custom_hooks = _base_.slope_hooks
