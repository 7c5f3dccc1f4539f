# SLOPE: a small DeiT with its attention, 2:4 sparsity, 2-bit weights.
_base_ = ['./deit_sign_digits_fp32.py', '../_base_/recipes/classifier_w2.py']
model = dict(type='slope_mm.SlopeModel', arch='ImageClassifier', recipe=_base_.recipe)
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor', regularizer=_base_.regularizer
)
custom_hooks = _base_.slope_hooks
