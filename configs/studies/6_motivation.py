# Study 6: the paper's motivation table on ResNet-18: 2:4 alone, low-bit alone, both, without a
# regularizer; then SLOPE on both.
title = 'Motivation: sparsity alone, low-bit alone, both'
tasks = dict(
    resnet18=dict(
        title='sign digits, ResNet-18',
        config='configs/classification/resnet18_sign_digits_fp32.py',
        start=dict(config='configs/classification/resnet18_sign_digits_scratch.py'),
        metrics=dict(top1='accuracy/top1'),
    ),
)
seeds = [0, 1, 2]
_bits = (4, 2)
arms = [
    dict(name='fp32'),
    dict(name='2:4', recipe=dict(weight=dict(sparsity='2:4', bits=None))),
]
for _b in _bits:
    _both = dict(weight=dict(sparsity='2:4', bits=_b))
    arms += [
        dict(name=f'W{_b}', recipe=dict(weight=dict(sparsity=None, bits=_b))),
        dict(name=f'2:4 W{_b}', recipe=_both),
        dict(name=f'SLOPE 2:4 W{_b}', recipe=_both, regularizer=dict(type='cosine', weight=3.0)),
    ]
tables = [
    dict(
        title=f'2:4 and {_b} bits',
        arms=['fp32', '2:4', f'W{_b}', f'2:4 W{_b}', f'SLOPE 2:4 W{_b}'],
        against=f'2:4 W{_b}',
        reference='fp32',
    )
    for _b in _bits
]
figures = [
    dict(
        kind='curves',
        name='curves',
        title='Compression without a regularizer',
        series={_n: [_n] for _n in ('2:4', 'W4', '2:4 W4', 'W2', '2:4 W2')},
    ),
]
