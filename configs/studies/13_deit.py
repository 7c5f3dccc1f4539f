# Study 13: a small DeiT on hand signs, its attention compressed. Needs mmpretrain.
title = 'A small DeiT with its attention compressed'
tasks = dict(
    deit=dict(
        title='sign digits, DeiT of 4 layers',
        config='configs/classification/deit_sign_digits_fp32.py',
        start=dict(config='configs/classification/deit_sign_digits_scratch.py'),
        metrics=dict(top1='accuracy/top1'),
    ),
)
seeds = [0, 1, 2]
_regularizers = {'naive': dict(), 'SLOPE': dict(regularizer=dict(type='cosine', weight=1.0))}
_bits = (4, 2)


def _recipe(bits):
    # The name of mmpretrain's last layer says nothing about predictions.
    edges = [dict(match='head', weight=dict(sparsity=None, bits=8))]
    return dict(weight=dict(sparsity='2:4', bits=bits), rules=edges)


arms = [
    dict(name='fp32'),
    *(
        dict(name=f'{_r} 2:4 W{_b}', recipe=_recipe(_b), **_regularizers[_r])
        for _b in _bits
        for _r in _regularizers
    ),
]
tables = [
    dict(
        title=f'2:4 + {_b} bit',
        arms=['fp32', *(f'{_r} 2:4 W{_b}' for _r in _regularizers)],
        against=f'naive 2:4 W{_b}',
        reference='fp32',
    )
    for _b in _bits
]
figures = [
    dict(
        kind='size',
        name='size',
        title='Accuracy and size',
        reference='fp32',
        series=dict(naive=['naive*'], SLOPE=['SLOPE*']),
    ),
]
