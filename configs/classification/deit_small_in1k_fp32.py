# The start and the schedule that all DeiT-S arms share: mmpretrain's published model,
# fine-tuned. Without a recipe this is the fp32 arm. Not trained on full ImageNet by us.
_base_ = [
    'mmpretrain::deit/deit-small_4xb256_in1k.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/schedules/imagenet_finetune.py',
]
train_cfg = dict(max_epochs=_base_.finetune_epochs)
param_scheduler = _base_.finetune_scheduler
optim_wrapper = dict(optimizer=dict(lr=1e-4))
randomness = dict(seed=0)
load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
