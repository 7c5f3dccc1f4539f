# Study 8: distillation from the fp32 detector on top of SLOPE, and what becomes of batch norms.
_base_ = '../_base_/studies/detection.py'
title = 'Distillation, and batch norm statistics'
tasks = dict(_delete_=True, shapes_trained_short={{_base_._trained_short}})
seeds = [0, 1, 2]
_recipe = dict(weight=dict(sparsity='2:4', bits=2))
_cosine = dict(type='cosine', weight=1.0)
# The teacher is the dense detector that its students start from.
_teacher = dict(
    type='slope_mm.SlopeDistillationHook',
    config='configs/mask_rcnn_r18_shapes_fp32.py',
    checkpoint='{start}',
)
# Masks as well as boxes.
_masks = dict(
    _teacher,
    mirrored=[
        'backbone',
        'neck',
        'rpn_head',
        'roi_head.bbox_roi_extractor',
        'roi_head.bbox_head',
        'roi_head.mask_roi_extractor',
        'roi_head.mask_head',
    ],
)


def _arm(name, *hooks, regularizer=_cosine):
    options = {'slope_hooks': list(hooks)} if hooks else {}
    return dict(name=name, recipe=_recipe, regularizer=regularizer, options=options)


def _norms(policy):
    return dict(type='slope_mm.SlopeBatchNormHook', policy=policy)


arms = [
    dict(name='fp32'),
    _arm('naive', regularizer=dict(type='none')),
    _arm('SLOPE'),
    _arm('naive + distillation', _teacher, regularizer=dict(type='none')),
    _arm('SLOPE + features', dict(logit_weight=0.0, **_teacher)),
    _arm('SLOPE + logits', dict(feature_weight=0.0, **_teacher)),
    _arm('SLOPE + distillation', _teacher),
    _arm('naive + distillation, masks too', _masks, regularizer=dict(type='none')),
    *(_arm(f'batch norms {_p}', _norms(_p)) for _p in ('frozen', 'adapting', 're-estimated')),
]
tables = [
    dict(
        title='Distillation, 2:4 W2',
        arms=['fp32', 'naive', 'naive + *', 'SLOPE', 'SLOPE + *'],
        against='naive',
        reference='fp32',
    ),
    dict(
        title='Batch norm statistics, 2:4 W2',
        arms=['SLOPE', 'batch norms *'],
        against='SLOPE',
        reference='fp32',
    ),
    dict(
        title='Distillation under SLOPE',
        pairs=[[f'SLOPE + {_what}', 'SLOPE'] for _what in ('features', 'logits', 'distillation')],
    ),
]
figures = [
    dict(
        kind='curves',
        name='curves',
        title='2:4 W2',
        series={
            'naive': ['naive'],
            'SLOPE': ['SLOPE'],
            'SLOPE + distillation': ['SLOPE + distillation'],
            'BN frozen': ['batch norms frozen'],
        },
    ),
]
