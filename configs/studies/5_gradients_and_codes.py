# Study 5: gradients, mask refresh and freezing, code sets, step granularity, first steps. From a
# trained start: where the model still has to learn, whatever holds it back looks bad (study 14).
_base_ = '../_base_/studies/detection.py'
title = 'Gradients, masks, code sets and steps'
tasks = dict(_delete_=True, shapes_trained_short={{_base_._trained_short}})
seeds = [0, 1, 2]


def _weight(bits=2, **more):
    return dict(sparsity='2:4', bits=bits, **more)


arms = [dict(name='fp32'), dict(name='2:4 W2', recipe=dict(weight=_weight()))]
arms += [
    dict(name=f'gradient {_g}', recipe=dict(weight=_weight(), gradient=_g))
    for _g in ('sr_ste', 'masked', 'soft')
]
arms += [
    dict(name=_name, recipe=dict(weight=_weight()), schedule=_schedule)
    for _name, _schedule in {
        'masks every 25 iterations': dict(mask_interval=25),
        'masks every 125 iterations': dict(mask_interval=125),
        'masks frozen from the start': dict(freeze_at=0),
        'masks frozen at half time': dict(freeze_at=0.5),
        'from dense to 2:4 until half time': dict(ramp_until=0.5),
    }.items()
]
_codes = [(_c, _b) for _b in (2, 3, 4) for _c in ('lsq', 'symmetric', 'odd')]
arms += [dict(name=f'{_c} W{_b}', recipe=dict(weight=_weight(_b, codes=_c))) for _c, _b in _codes]
arms += [
    dict(name=f'one step a tensor W{_b}', recipe=dict(weight=_weight(_b, step='tensor')))
    for _b in (2, 4)
]
# Beside the default, a search over clip ranges followed by least squares.
_firsts = {'formula': 'lsq', 'least squares': 'least_squares'}
arms += [
    dict(
        name=f'first step by {_name} W{_b}',
        recipe=dict(weight=_weight(_b)),
        options={'slope_hooks': [dict(type='slope_mm.SlopeStepInitHook', method=_method)]},
    )
    for _b in (2, 4)
    for _name, _method in _firsts.items()
]
tables = [
    dict(
        title='Gradients and masks, 2:4 W2',
        arms=['2:4 W2', 'gradient *', 'masks *', 'from dense *'],
        against='2:4 W2',
        reference='fp32',
    ),
    *(
        dict(
            title=f'Code sets, 2:4 W{_b}',
            arms=[f'{_c} W{_b}' for _c in ('lsq', 'symmetric', 'odd')],
            against=f'lsq W{_b}',
            reference='fp32',
        )
        for _b in (2, 3, 4)
    ),
    dict(
        title='First steps by other rules than the search',
        pairs=[
            [f'first step by {_name} W{_b}', f'lsq W{_b}'] for _b in (2, 4) for _name in _firsts
        ],
    ),
    dict(
        title='Steps by tensor against steps by channel',
        pairs=[[f'one step a tensor W{_b}', f'lsq W{_b}'] for _b in (2, 4)],
    ),
]
figures = [
    dict(
        kind='bits',
        name='codes',
        title='Code sets at 2:4',
        reference='fp32',
        series={_c: [f'{_c} W?'] for _c in ('lsq', 'symmetric', 'odd')},
    ),
    dict(
        kind='curves',
        name='curves',
        title='2:4 W2',
        series={
            'ste': ['2:4 W2'],
            'sr_ste': ['gradient sr_ste'],
            'masked': ['gradient masked'],
            'soft': ['gradient soft'],
            'every 25': ['masks every 25 iterations'],
            'frozen at half time': ['masks frozen at half time'],
            'ramp until half time': ['from dense *'],
        },
    ),
]
