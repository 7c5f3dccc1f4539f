# Study 4: sparsify then quantize, or the other way round, from a trained start; do both errors add
# up?
_base_ = '../_base_/studies/detection.py'
title = 'Order of sparsity and quantization, and whether their errors add up'
tasks = dict(_delete_=True, shapes_trained_short={{_base_._trained_short}})
seeds = [0, 1, 2]
_bits = (4, 2)
arms = [
    dict(name='fp32'),
    dict(name='2:4', recipe=dict(weight=dict(sparsity='2:4', bits=None))),
]
arms += [dict(name=f'W{_b}', recipe=dict(weight=dict(sparsity=None, bits=_b))) for _b in _bits]
arms += [
    dict(
        name=f'{_name} W{_b}',
        recipe=dict(weight=dict(sparsity='2:4', bits=_b), order=_order),
    )
    for _b in _bits
    for _name, _order in (('S→Q 2:4', 's_then_q'), ('Q→S 2:4', 'q_then_s'))
]
tables = [
    dict(
        title=f'2:4 and {_b} bits',
        arms=['fp32', '2:4', f'W{_b}', f'S→Q 2:4 W{_b}', f'Q→S 2:4 W{_b}'],
        against=f'S→Q 2:4 W{_b}',
        reference='fp32',
    )
    for _b in _bits
]
thresholds = [
    dict(
        dense='fp32',
        sparse='2:4',
        quantized=f'W{_b}',
        combined=[f'S→Q 2:4 W{_b}', f'Q→S 2:4 W{_b}'],
    )
    for _b in _bits
]
interplay = dict(sparsity=['2:4', '2:8', '2:16', 'unstructured:0.5'], bits=[8, 4, 3, 2])
figures = [
    dict(
        kind='bits',
        name='bits',
        title='Order at 2:4',
        reference='2:4',
        series={'S→Q': ['S→Q *'], 'Q→S': ['Q→S *'], 'dense': ['W?']},
    ),
]
