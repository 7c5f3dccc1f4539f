# Study 14: under which conditions does the regularizer help? On a classifier, where five seeds
# cost minutes: when lambda acts, the optimizer, a code set without a zero, and how far the dense
# start is trained. Seeds and start are neither those of study 10 nor those of study 11.
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


def _recipe(codes='lsq'):
    return dict(weight=dict(sparsity='2:4', bits=2, codes=codes))


def _arm(name, recipe, options=None, **more):
    return dict(
        name=name, recipe=recipe, options={'slope_hooks': _hooks, **(options or {})}, **more
    )


def _trained(name, recipe, **more):
    return _arm(name, recipe, tasks=['trained'], **more)


arms = [
    dict(name='fp32'),
    _arm('naive', _recipe()),
    _arm('SLOPE', _recipe(), **_cosine),
    _trained('SLOPE, late', _recipe(), **_late),
    _trained('SLOPE, early', _recipe(), **_early),
    _trained('AdamW naive', _recipe(), options=_adamw),
    _trained('AdamW SLOPE', _recipe(), options=_adamw, **_cosine),
    _trained('AdamW SLOPE, late', _recipe(), options=_adamw, **_late),
    _trained('odd naive', _recipe('odd')),
    _trained('odd SLOPE', _recipe('odd'), **_cosine),
]
tables = [
    dict(
        title='2:4 W2',
        arms=['fp32', 'naive', 'SLOPE*', 'odd *', 'AdamW *'],
        against='naive',
        reference='fp32',
    ),
    dict(
        title='Where the regularizer acts, and where not',
        pairs=[
            ['SLOPE', 'naive'],
            ['SLOPE, late', 'naive'],
            ['SLOPE, early', 'naive'],
            ['SLOPE, late', 'SLOPE'],
            ['AdamW SLOPE', 'AdamW naive'],
            ['AdamW SLOPE, late', 'AdamW naive'],
            ['odd SLOPE', 'odd naive'],
            ['odd naive', 'naive'],
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
            for _n in ('naive', 'SLOPE', 'SLOPE, late', 'SLOPE, early', 'AdamW SLOPE', 'odd SLOPE')
        },
    ),
]
