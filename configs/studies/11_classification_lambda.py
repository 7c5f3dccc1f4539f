# Study 11: lambda on the classifier of study 10, with other seeds and another dense start.
_base_ = '../_base_/studies/sign_digits.py'
title = 'Lambda on the classifier, SGD'
seeds = [0, 1, 2]
_severities = {'2:8 W2': ('2:8', 2), '2:4 W2': ('2:4', 2)}
_lambdas = (0.03, 0.3, 3.0, 30.0)
_kinds = {'L2': 'l2', 'cosine': 'cosine'}


def _recipe(severity):
    sparsity, bits = _severities[severity]
    return dict(weight=dict(sparsity=sparsity, bits=bits))


arms = [dict(name='fp32')]
for _s in _severities:
    arms.append(dict(name=f'{_s} naive', recipe=_recipe(_s)))
    arms += [
        dict(
            name=f'{_s} {_k} {_l:g}',
            recipe=_recipe(_s),
            regularizer=dict(type=_kinds[_k], weight=_l),
        )
        for _k in _kinds
        for _l in _lambdas
    ]
tables = [
    dict(title=_s, arms=['fp32', f'{_s} *'], against=f'{_s} naive', reference='fp32')
    for _s in _severities
]
figures = [
    dict(
        kind='lambda',
        name=f'lambda_{_s.replace(":", "x").replace(" ", "_").lower()}',
        title=f'{_s}, SGD',
        reference='fp32',
        series={_k: [f'{_s} naive', f'{_s} {_k} *'] for _k in _kinds},
    )
    for _s in _severities
]
