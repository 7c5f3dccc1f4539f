# Study 12: the paper's classification tables on ImageNet, for a machine with several GPUs:
#   python tools/ablate.py 12_imagenet --launcher pytorch --processes 8
title = 'ImageNet: ResNet-18, ResNet-50, DeiT-S and ViT-S'
not_run = (
    'Not run: it needs mmpretrain, ImageNet under `data/imagenet` and several GPUs. The study file'
    ' is complete; where mmpretrain is installed, the tests build its networks.'
)
_nets = {
    'resnet18': 'ResNet-18',
    'resnet50': 'ResNet-50',
    'deit_small': 'DeiT-S',
    'vit_small': 'ViT-S',
}
tasks = {
    _net: dict(
        title=_title,
        config=f'configs/classification/{_net}_in1k_fp32.py',
        metrics=dict(top1='accuracy/top1'),
    )
    for _net, _title in _nets.items()
}
seeds = [0, 1, 2]
_lambda = 3.0
_bits = (4, 2)


def _recipe(bits, sparsity='2:4'):
    # The name of mmpretrain's last layer says nothing about predictions.
    edges = [dict(match='head', weight=dict(sparsity=None, bits=8))]
    return dict(weight=dict(sparsity=sparsity, bits=bits), rules=edges)


arms = [dict(name='fp32'), dict(name='dense W4', recipe=_recipe(4, None))]
for _b in _bits:
    arms += [
        dict(name=f'naive 2:4 W{_b}', recipe=_recipe(_b)),
        dict(name=f'L2 2:4 W{_b}', recipe=_recipe(_b), regularizer=dict(type='l2', weight=_lambda)),
        dict(
            name=f'SLOPE 2:4 W{_b}',
            recipe=_recipe(_b),
            regularizer=dict(type='cosine', weight=_lambda),
        ),
    ]
tables = [
    dict(
        title=f'2:4 + {_b} bit',
        arms=['fp32', 'dense W4', *(f'{_r} 2:4 W{_b}' for _r in ('naive', 'L2', 'SLOPE'))],
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
        series=dict(dense=['dense*'], naive=['naive*'], L2=['L2*'], SLOPE=['SLOPE*']),
    ),
]
