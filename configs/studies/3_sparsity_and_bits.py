# Study 3: sparsity levels and bits, from a trained start. Does 2:16 + 2 bit fail here too?
_base_ = '../_base_/studies/detection.py'
title = 'Sparsity levels and bits'
tasks = dict(_delete_=True, shapes_trained_short={{_base_._trained_short}})
seeds = [0, 1, 2]
_cosine = dict(type='cosine', weight=1.0)
_levels = ['2:4', '4:8', '1:4', '2:8', '2:16']
_densities = ['unstructured:0.5', 'unstructured:0.25', 'unstructured:0.125']
_settings = (
    [(_s, 4) for _s in _levels + _densities]
    + [('2:4', _b) for _b in (8, 6, 3, 2)]
    + [('2:8', 2), ('2:16', 2)]
)
arms = [dict(name='fp32')]
arms += [
    arm
    for _s, _b in _settings
    for arm in (
        dict(name=f'naive {_s} W{_b}', recipe=dict(weight=dict(sparsity=_s, bits=_b))),
        dict(
            name=f'SLOPE {_s} W{_b}',
            recipe=dict(weight=dict(sparsity=_s, bits=_b)),
            regularizer=_cosine,
        ),
    )
]
_naive = [f'naive {_s} W{_b}' for _s, _b in _settings]
tables = [
    dict(
        title='Levels at 4 bits, without a regularizer',
        arms=['fp32', *(_n for _n in _naive if _n.endswith('W4'))],
        against='naive 2:4 W4',
        reference='fp32',
    ),
    dict(
        title='N:M against unstructured at equal density, without a regularizer',
        pairs=[
            ['naive 2:4 W4', 'naive unstructured:0.5 W4'],
            ['naive 4:8 W4', 'naive unstructured:0.5 W4'],
            ['naive 1:4 W4', 'naive unstructured:0.25 W4'],
            ['naive 2:8 W4', 'naive unstructured:0.25 W4'],
            ['naive 2:16 W4', 'naive unstructured:0.125 W4'],
        ],
    ),
    dict(
        title='Bits at 2:4, without a regularizer',
        arms=[f'naive 2:4 W{_b}' for _b in (8, 6, 4, 3, 2)],
        against='naive 2:4 W8',
        reference='fp32',
    ),
    dict(
        title='2 bits',
        arms=['fp32', '* W2'],
        against='naive 2:4 W2',
        reference='fp32',
    ),
    dict(
        title='Does the regularizer help?',
        pairs=[[f'SLOPE {_s} W{_b}', f'naive {_s} W{_b}'] for _s, _b in _settings],
    ),
]
figures = [
    dict(
        kind='sparsity',
        name='sparsity',
        title='Patterns at 4 bits',
        reference='fp32',
        series=dict(naive=['naive * W4'], SLOPE=['SLOPE * W4']),
    ),
    dict(
        kind='bits',
        name='bits',
        title='Bits at 2:4',
        reference='fp32',
        series=dict(naive=['naive 2:4 *'], SLOPE=['SLOPE 2:4 *']),
    ),
    dict(
        kind='size',
        name='size',
        title='Accuracy and size',
        reference='fp32',
        series=dict(naive=['naive *'], SLOPE=['SLOPE *']),
    ),
    dict(
        kind='curves',
        name='curves_w2',
        title='2 bits, without a regularizer',
        series={_s: [f'naive {_s} W2'] for _s in ('2:4', '2:8', '2:16')},
    ),
]
