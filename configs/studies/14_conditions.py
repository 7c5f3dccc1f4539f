# Study 14: under which conditions does the regularizer help, and does it help by keeping masks
# still? On a classifier, where five seeds cost minutes. Seeds and start are neither those of study
# 10 nor those of study 11.
title = 'Conditions under which the regularizer helps'
_config = 'configs/classification/resnet_tiny_sign_digits_fp32.py'
_scratch = 'configs/classification/resnet_tiny_sign_digits_scratch.py'
_metrics = dict(top1='accuracy/top1')
_young_epochs = 4
tasks = dict(
    trained=dict(
        title='sign digits, ResNet 8-16-32, start of 30 epochs',
        config=_config,
        start=dict(config=_scratch),
        metrics=_metrics,
    ),
    young=dict(
        title=f'sign digits, ResNet 8-16-32, start of {_young_epochs} epochs',
        config=_config,
        start=dict(
            config=_scratch,
            options={
                'train_cfg.max_epochs': _young_epochs,
                'param_scheduler': [
                    dict(
                        type='CosineAnnealingLR',
                        by_epoch=True,
                        T_max=_young_epochs,
                        eta_min=1e-4,
                        convert_to_iter_based=True,
                    ),
                ],
            },
        ),
        metrics=_metrics,
    ),
)
seeds = [8, 9, 10, 11, 12]
_adamw = {'optim_wrapper.optimizer': dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05)}
# The hooks of all arms, and the regularizer's gradient against the task's at every look.
_hooks = [
    dict(type='slope_mm.EpochSeedHook'),
    dict(type='slope_mm.SlopeScheduleHook'),
    dict(type='slope_mm.SlopeMonitorHook', gradients=True),
]
_cosine = dict(regularizer=dict(type='cosine', weight=3.0))
# lambda rises from 0 all the time, or falls to 0 all the time.
_late = dict(**_cosine, schedule=dict(warmup=1.0))
_early = dict(**_cosine, schedule=dict(decay_from=0))
_frozen = dict(freeze_at=0.5)


def _recipe(**more):
    return dict(weight=dict(sparsity='2:4', bits=2), **more)


def _arm(name, recipe, options=None, **more):
    options = {'slope_hooks': _hooks, **(options or {})}
    return dict(name=name, recipe=recipe, options=options, **more)


def _trained(name, recipe, **more):
    return _arm(name, recipe, tasks=['trained'], **more)


arms = [
    dict(name='fp32'),
    _arm('naive', _recipe()),
    _arm('SLOPE', _recipe(), **_cosine),
    _trained('naive, masks frozen at half time', _recipe(), schedule=_frozen),
    _trained('SLOPE, masks frozen at half time', _recipe(), schedule=_frozen, **_cosine),
    _trained('SLOPE, late', _recipe(), **_late),
    _trained('SLOPE, early', _recipe(), **_early),
    _trained('AdamW naive', _recipe(), options=_adamw),
    _trained('AdamW SLOPE', _recipe(), options=_adamw, **_cosine),
    _trained('SR-STE', _recipe(gradient='sr_ste')),
]
tables = [
    dict(
        title='2:4 W2',
        arms=['fp32', 'naive', 'SLOPE', 'naive, *', 'SLOPE, *', 'SR-STE', 'AdamW *'],
        against='naive',
        reference='fp32',
    ),
    dict(
        title='Where the regularizer helps, and what else helps',
        pairs=[
            ['SLOPE', 'naive'],
            ['naive, masks frozen at half time', 'naive'],
            ['SLOPE, masks frozen at half time', 'naive, masks frozen at half time'],
            ['SLOPE, late', 'naive'],
            ['SLOPE, early', 'naive'],
            ['SLOPE, late', 'SLOPE, early'],
            ['SLOPE, late', 'SLOPE'],
            ['SR-STE', 'naive'],
            ['SLOPE', 'SR-STE'],
            ['AdamW SLOPE', 'AdamW naive'],
        ],
    ),
]
figures = [
    dict(
        kind='curves',
        name='curves',
        title='2:4 W2',
        tasks=['trained'],
        series={
            _n: [_n]
            for _n in (
                'naive',
                'SLOPE',
                'naive, masks frozen at half time',
                'SLOPE, late',
                'SLOPE, early',
                'AdamW naive',
                'AdamW SLOPE',
            )
        },
    ),
]
