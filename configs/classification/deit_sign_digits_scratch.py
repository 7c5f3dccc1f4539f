# The dense model that all arms of the small DeiT start from. Needs mmpretrain.
_base_ = [
    '../_base_/models/deit_tiny_sign_digits.py',
    '../_base_/datasets/sign_digits_mmpretrain.py',
    '../_base_/schedules/classifier_dense.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
default_scope = 'mmpretrain'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
