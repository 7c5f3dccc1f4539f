# The start and the schedule that all arms of the small DeiT share: the model of `_scratch`,
# fine-tuned. Without a recipe this is the fp32 arm. Needs mmpretrain.
_base_ = [
    '../_base_/models/deit_tiny_sign_digits.py',
    '../_base_/datasets/sign_digits_mmpretrain.py',
    '../_base_/schedules/classifier_finetune.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/classifier_runtime.py',
]
default_scope = 'mmpretrain'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
load_from = 'work_dirs/deit_sign_digits_scratch/epoch_30.pth'
