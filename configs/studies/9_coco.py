# Study 9: the paper's settings with Mask R-CNN R50 on COCO, for a machine with several GPUs:
#   python tools/ablate.py 9_coco --launcher pytorch --processes 8
title = 'Mask R-CNN R50 on COCO, the paper’s settings'
not_run = (
    'Not run: it needs COCO under `data/coco` and several GPUs. The study file is complete; the'
    ' tests build the configs of all its arms.'
)
tasks = dict(
    coco=dict(
        title='COCO val2017',
        config='configs/mask_rcnn_r50_fp32.py',
        metrics=dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP'),
    ),
)
seeds = [0, 1, 2]
# For this schedule's SGD; calculated, not measured: docs/method.md.
_lambda = 10.0
_l2 = dict(type='l2', weight=_lambda)
_cosine = dict(type='cosine', weight=_lambda)
_recipes = {
    'W4': dict(weight=dict(sparsity='2:4', bits=4)),
    'W2': dict(weight=dict(sparsity='2:4', bits=2)),
    'W4A4': dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4)),
}
arms = [
    dict(name='fp32'),
    dict(name='dense W4', recipe=dict(weight=dict(sparsity=None, bits=4))),
    dict(
        name='dense W4A4',
        recipe=dict(weight=dict(sparsity=None, bits=4), activation=dict(bits=4)),
    ),
]
arms += [
    arm
    for _name, _recipe in _recipes.items()
    for arm in (
        dict(name=f'naive 2:4 {_name}', recipe=_recipe),
        dict(name=f'L2 2:4 {_name}', recipe=_recipe, regularizer=_l2),
        dict(name=f'SLOPE 2:4 {_name}', recipe=_recipe, regularizer=_cosine),
    )
]
arms += [
    dict(
        name=f'SLOPE {_s} W4',
        recipe=dict(weight=dict(sparsity=_s, bits=4)),
        regularizer=_cosine,
    )
    for _s in ('2:8', '2:16')
]
tables = [
    dict(
        title=f'2:4 {_name}',
        arms=['fp32', *(f'{_arm} 2:4 {_name}' for _arm in ('naive', 'L2', 'SLOPE'))],
        against=f'naive 2:4 {_name}',
        reference='fp32',
    )
    for _name in _recipes
] + [
    dict(
        title='Against dense low-bit',
        arms=['dense W4', 'SLOPE 2:4 W4', 'SLOPE 2:8 W4', 'SLOPE 2:16 W4'],
        against='dense W4',
        reference='fp32',
    ),
    dict(arms=['dense W4A4', 'SLOPE 2:4 W4A4'], against='dense W4A4', reference='fp32'),
]
figures = [
    dict(
        kind='size',
        name='size',
        title='Accuracy and size',
        reference='fp32',
        series=dict(dense=['dense*'], naive=['naive*'], L2=['L2*'], SLOPE=['SLOPE*']),
    ),
]
