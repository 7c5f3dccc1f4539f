# Study 15: the optimizer. Adam divides gradients by their size, so that lambda says little under
# it; does the paper's order appear under SGD? What the sweep chooses (seed 3: the rate by naive
# alone, then lambda and when it acts) is compared on other seeds, on nuclei, whose dense start has
# converged.
_base_ = '../_base_/studies/detection.py'
title = 'The optimizer'
seeds = [0, 1, 2, 3]
_sweep = [3]
_compared = [0, 1, 2]
_recipes = {
    '2:4 W2': dict(weight=dict(sparsity='2:4', bits=2)),
    '2:4 W4A4': dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4)),
}
# Decays to 0 under a cosine, as AdamW's 5e-4 does in the other studies.
_rates = (0.005, 0.02, 0.08)
_lambdas = (1.0, 10.0, 100.0)
_rate, _lambda = 0.005, 1.0
_late = dict(warmup=1.0)


def _sgd(lr):
    return {
        'optim_wrapper.optimizer': dict(
            _delete_=True, type='SGD', lr=lr, momentum=0.9, weight_decay=1e-4
        )
    }


def _arm(name, recipe, lr=_rate, seeds=_compared, **more):
    return dict(
        name=f'{name} {recipe}', recipe=_recipes[recipe], options=_sgd(lr), seeds=seeds, **more
    )


def _cosine(weight):
    return dict(regularizer=dict(type='cosine', weight=weight))


arms = [dict(name='fp32', options=_sgd(_rate), seeds=_compared)]
arms += [_arm(f'lr {_lr:g} naive', '2:4 W2', _lr, _sweep) for _lr in _rates]
arms += [_arm(f'lambda {_l:g} SLOPE', '2:4 W2', seeds=_sweep, **_cosine(_l)) for _l in _lambdas]
arms += [
    _arm(f'lambda {_l:g}, late, SLOPE', '2:4 W2', seeds=_sweep, schedule=_late, **_cosine(_l))
    for _l in _lambdas
]
_kinds = dict(
    naive=dict(),
    L2=dict(regularizer=dict(type='l2', weight=_lambda)),
    SLOPE=_cosine(_lambda),
)
arms += [_arm(_kind, _recipe, **_more) for _recipe in _recipes for _kind, _more in _kinds.items()]
_naive = f'lr {_rate:g} naive 2:4 W2'
tables = [
    dict(title='The rate of SGD, naive 2:4 W2', arms=['lr *'], against=_naive),
    dict(title='Lambda and when it acts', arms=[_naive, 'lambda *'], against=_naive),
    dict(
        title='Late against constant',
        pairs=[
            [f'lambda {_l:g}, late, SLOPE 2:4 W2', f'lambda {_l:g} SLOPE 2:4 W2'] for _l in _lambdas
        ],
    ),
    dict(
        title='SGD',
        arms=['fp32', 'naive 2:4 *', 'L2 2:4 *', 'SLOPE 2:4 *'],
        against='fp32',
        reference='fp32',
    ),
    dict(
        title='The order of the paper under SGD',
        pairs=[
            [f'{_a} {_r}', f'{_b} {_r}']
            for _r in _recipes
            for _a, _b in (('SLOPE', 'naive'), ('SLOPE', 'L2'), ('L2', 'naive'))
        ],
    ),
]
figures = [
    dict(
        kind='curves',
        name='curves',
        title='2:4 W2, SGD',
        tasks=['nuclei'],
        series={
            'naive': [_naive],
            **{f'λ = {_l:g}': [f'lambda {_l:g} SLOPE 2:4 W2'] for _l in _lambdas},
            'λ = 10, late': ['lambda 10, late, SLOPE 2:4 W2'],
        },
    ),
]
