# Study 16: from a trained start 2:4 W4 keeps 99 % of shapes' box mAP and 97 % of its mask mAP.
# Which layers do masks lose by, and is it the sparsity or the bits? Whether time brings it back is
# asked by the task `shapes_trained_long` of study 1.
_base_ = '../_base_/studies/detection.py'
title = 'What masks lose by'
tasks = dict(_delete_=True, shapes_trained={{_base_._trained}})
seeds = [0, 1, 2]
_w4 = dict(sparsity='2:4', bits=4)
_head = 'roi_head.mask_head'


def _rules(match, **rule):
    # A rule replaces those for prediction layers too.
    prediction = dict(match=f'{_head}.conv_logits', weight=dict(sparsity=None, bits=8))
    return dict(weight=_w4, rules=[dict(match=match, **rule), prediction])


# The stem keeps its own rule: dense, 8 bits.
_backbone = dict(
    weight=_w4, rules=[dict(match='re:backbone.layer.*', weight=dict(sparsity=None, bits=4))]
)
arms = [
    dict(name='fp32'),
    dict(name='2:4 W4', recipe=dict(weight=_w4)),
    dict(name='mask head dense W4', recipe=_rules(_head, weight=dict(sparsity=None, bits=4))),
    dict(name='mask head 2:4 W8', recipe=_rules(_head, weight=dict(sparsity='2:4', bits=8))),
    dict(name='mask head dense W8', recipe=_rules(_head, weight=dict(sparsity=None, bits=8))),
    dict(name='neck dense W4', recipe=_rules('neck', weight=dict(sparsity=None, bits=4))),
    dict(name='backbone dense W4', recipe=_backbone),
    dict(name='all dense W4', recipe=dict(weight=dict(sparsity=None, bits=4))),
    dict(name='all 2:4', recipe=dict(weight=dict(sparsity='2:4', bits=None))),
    dict(
        name='mask head alone',
        recipe=dict(weight=_w4, rules=[dict(match=f're:(?!{_head}).*', compress=False)]),
    ),
]
tables = [
    dict(
        title='One part spared',
        arms=[
            'fp32',
            '2:4 W4',
            'mask head dense *',
            'mask head 2:4 W8',
            'neck *',
            'backbone *',
            'all *',
        ],
        against='2:4 W4',
        reference='fp32',
    ),
    dict(title='The mask head alone', arms=['fp32', 'mask head alone'], against='fp32'),
]
figures = [
    dict(
        kind='size',
        name='size',
        title='One part spared',
        reference='fp32',
        series={
            'everything 2:4 W4': ['2:4 W4'],
            'mask head spared': ['mask head dense *', 'mask head 2:4 W8'],
            'neck spared': ['neck *'],
            'backbone spared': ['backbone *'],
            'everything dense W4': ['all dense W4'],
            'everything 2:4, fp32': ['all 2:4'],
        },
    ),
]
