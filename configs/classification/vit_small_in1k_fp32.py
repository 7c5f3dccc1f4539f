# The start and the schedule that all ViT-S/16 arms share: MoCo v3's model with its linear head, as
# mmpretrain publishes it, fine-tuned. Without a recipe this is the fp32 arm. Not trained on full
# ImageNet by us.
_base_ = [
    'mmpretrain::mocov3/benchmarks/vit-small-p16_8xb128-linear-coslr-90e_in1k.py',
    '../_base_/schedules/slope_hooks.py',
    '../_base_/schedules/imagenet_finetune.py',
]
# All layers learn: the linear benchmark that this comes from trains the head alone.
model = dict(backbone=dict(frozen_stages=-1, stop_grad_conv1=False, init_cfg=None))
train_cfg = dict(max_epochs=_base_.finetune_epochs)
param_scheduler = _base_.finetune_scheduler
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05))
randomness = dict(seed=0)
load_from = 'https://download.openmmlab.com/mmselfsup/1.x/mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k/vit-small-p16_linear-8xb128-coslr-90e_in1k/vit-small-p16_linear-8xb128-coslr-90e_in1k_20220826-376674ef.pth'
