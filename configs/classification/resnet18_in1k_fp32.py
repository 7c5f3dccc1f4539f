# The start and the schedule that all ResNet-18 arms share: mmpretrain's published model,
# fine-tuned. Without a recipe this is the fp32 arm. Not trained on full ImageNet by us.
_base_ = [
    'mmpretrain::resnet/resnet18_8xb32_in1k.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/schedules/imagenet_finetune.py',
]
train_cfg = dict(max_epochs=_base_.finetune_epochs)
param_scheduler = _base_.finetune_scheduler
optim_wrapper = dict(optimizer=dict(lr=0.01))
randomness = dict(seed=0)
load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet18_8xb32_in1k_20210831-fbbb1da6.pth'
