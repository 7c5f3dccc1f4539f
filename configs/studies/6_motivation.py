# Study 6: the paper's motivation table: 2:4 alone, low-bit alone, both, without a regularizer.
_base_ = '../_base_/studies/shapes_short.py'
title = 'Motivation: sparsity alone, low-bit alone, both'
seeds = [0, 1, 2]
arms = [
    dict(name='fp32'),
    dict(name='2:4', recipe=dict(weight=dict(sparsity='2:4', bits=None))),
    *(
        arm
        for _b in (4, 2)
        for arm in (
            dict(name=f'W{_b}', recipe=dict(weight=dict(sparsity=None, bits=_b))),
            dict(name=f'2:4 W{_b}', recipe=dict(weight=dict(sparsity='2:4', bits=_b))),
        )
    ),
]
tables = [dict(arms=['*'], against='fp32', reference='fp32')]
figures = [
    dict(
        kind='curves',
        name='curves',
        title='Compression without a regularizer',
        series={_n: [_n] for _n in ('2:4', 'W4', '2:4 W4', 'W2', '2:4 W2')},
    ),
]
