# SLOPE: 2:4 sparsity, 4-bit weights.
_base_ = ['./resnet18_sign_digits_fp32.py', '../_base_/recipes/slope_w4.py']
model = dict(type='slope_mm.SlopeModel', arch='slope_mm.Classifier', recipe=_base_.recipe)
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=_base_.regularizer
)
custom_hooks = _base_.slope_hooks
