# SLOPE: 2:4 sparsity, 4-bit weights, 4-bit activations, on COCO.
_base_ = ['./cascade_mask_rcnn_r50_fp32.py', './_base_/recipes/slope_w4a4.py']
model = dict(type='slope_mm.SlopeModel', arch='CascadeRCNN', recipe=_base_.recipe)
# lambda is that of Mask R-CNN under SGD (docs/method.md); no schedule was tuned for this model.
optim_wrapper = dict(
    constructor='slope_mm.SlopeOptimWrapperConstructor',
    regularizer=dict(type='cosine', weight=10.0),
)
custom_hooks = _base_.slope_hooks
