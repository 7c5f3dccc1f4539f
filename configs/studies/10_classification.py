# Study 10: fp32, naive, L2 and SLOPE on a classifier, where the compression is mild and where it is
# not. Lambda is 3 for both regularizers, fixed before these seeds ran; study 11 sweeps it, with
# other seeds and another dense start.
_base_ = '../_base_/studies/sign_digits.py'
title = 'Classification: naive, L2 and SLOPE'
seeds = [3, 4, 5, 6, 7]
_severities = {'2:4 W4': ('2:4', 4), '2:4 W2': ('2:4', 2), '2:8 W2': ('2:8', 2)}
_regularizers = {
    'naive': dict(),
    'L2': dict(regularizer=dict(type='l2', weight=3.0)),
    'SLOPE': dict(regularizer=dict(type='cosine', weight=3.0)),
}


def _recipe(severity):
    sparsity, bits = _severities[severity]
    return dict(weight=dict(sparsity=sparsity, bits=bits))


arms = [
    dict(name='fp32'),
    *(
        dict(name=f'{_r} {_s}', recipe=_recipe(_s), **_regularizers[_r])
        for _s in _severities
        for _r in _regularizers
    ),
]
tables = [
    *(
        dict(
            title=_s,
            arms=['fp32', *(f'{_r} {_s}' for _r in _regularizers)],
            against=f'naive {_s}',
            reference='fp32',
        )
        for _s in _severities
    ),
    dict(
        title='The order of the paper: SLOPE above L2 above naive',
        pairs=[
            [f'{_arm} {_s}', f'{_other} {_s}']
            for _s in _severities
            for _arm, _other in (('SLOPE', 'naive'), ('SLOPE', 'L2'), ('L2', 'naive'))
        ],
    ),
]
_series = dict(naive=['naive*'], L2=['L2*'], SLOPE=['SLOPE*'])
figures = [
    dict(kind='size', name='size', series=_series, reference='fp32', title='Accuracy and size'),
    *(
        dict(
            kind='curves',
            name=f'curves_{_s.replace(":", "x").replace(" ", "_").lower()}',
            series={_r: [f'{_r} {_s}'] for _r in _regularizers},
            title=_s,
        )
        for _s in ('2:4 W2', '2:8 W2')
    ),
]
