# The start that both arms share: mmdet's published RTMDet-Ins-s (box 44.0, mask 38.7 on COCO
# val2017), fine-tuned for 12 epochs by the second stage's pipeline, without mosaic and mix-up.
_base_ = 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py'
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline_stage2))
train_cfg = dict(max_epochs=12, val_interval=1, dynamic_intervals=None)
optim_wrapper = dict(optimizer=dict(lr=0.0005))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=12,
        eta_min=2.5e-5,
        convert_to_iter_based=True,
    ),
]
slope_hooks = [
    dict(
        type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49
    ),
    dict(type='slope_mm.EpochSeedHook'),
    dict(type='slope_mm.SlopeCalibrationHook', batches=4),
    dict(type='slope_mm.SlopeScheduleHook'),
    dict(type='slope_mm.SlopeFiniteHook'),
    dict(type='slope_mm.SlopeMonitorHook', interval=25),
]
custom_hooks = slope_hooks[:2]
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet-ins_s_8xb32-300e_coco/rtmdet-ins_s_8xb32-300e_coco_20221121_212604-fdc5d7ec.pth'
