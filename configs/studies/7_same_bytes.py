# Study 7: dense 2 and 3 bit at the bytes of N:M with more bits. Where does N:M earn its place?
_base_ = '../_base_/studies/shapes_short.py'
title = 'Dense low-bit and N:M at the same bytes'
seeds = [0, 1, 2]
_cosine = dict(type='cosine', weight=1.0)
_settings = [(None, 4), (None, 3), (None, 2), ('2:4', 4), ('2:4', 3), ('2:4', 2), ('2:8', 4)]
arms = [dict(name='fp32')]
arms += [
    arm
    for _s, _b in _settings
    for arm in (
        dict(name=f'naive {_s or "dense"} W{_b}', recipe=dict(weight=dict(sparsity=_s, bits=_b))),
        dict(
            name=f'cosine {_s or "dense"} W{_b}',
            recipe=dict(weight=dict(sparsity=_s, bits=_b)),
            regularizer=_cosine,
        ),
    )
]
tables = [
    dict(
        title='All',
        arms=['fp32', 'naive *', 'cosine *'],
        against='naive dense W2',
        reference='fp32',
    ),
    # Bits a weight: 2:4 W4 2.75, dense W3 3, dense W2 2, 2:4 W2 1.75, 2:8 W4 1.625.
    dict(
        title='2:4 W4 (2.75 bits a weight) against dense W3 (3)',
        arms=['* 2:4 W4'],
        against='naive dense W3',
        reference='fp32',
    ),
    dict(
        title='2:4 W2 (1.75) and 2:8 W4 (1.625) against dense W2 (2)',
        arms=['* 2:4 W2', '* 2:8 W4'],
        against='naive dense W2',
        reference='fp32',
    ),
]
_series = {
    'dense': ['naive dense *'],
    'dense, cosine': ['cosine dense *'],
    'N:M': ['naive 2:*'],
    'N:M, cosine (SLOPE)': ['cosine 2:*'],
}
figures = [
    dict(kind='size', name='size', title='Accuracy and size', reference='fp32', series=_series),
    dict(
        kind='operations',
        name='operations',
        title='Accuracy and bit operations',
        reference='fp32',
        series=_series,
    ),
]
