# Study 7: dense 2 and 3 bit at the bytes of N:M with more bits. Where does N:M earn its place?
_base_ = '../_base_/studies/detection.py'
title = 'Dense low-bit and N:M at the same bytes'
tasks = dict(_delete_=True, shapes_trained_short={{_base_._trained_short}})
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
    # Bits a weight: dense W3 3, 2:4 W4 2.75, dense W2 2, 2:4 W2 1.75, 2:8 W4 1.625.
    dict(
        title='N:M against the dense arm with a few more bytes',
        pairs=[
            [f'{_kind} {_sparse}', f'{_kind} {_dense}']
            for _sparse, _dense in (
                ('2:4 W4', 'dense W3'),
                ('2:4 W2', 'dense W2'),
                ('2:8 W4', 'dense W2'),
            )
            for _kind in ('naive', 'cosine')
        ],
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
