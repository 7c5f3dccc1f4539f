# SLOPE for mmpretrain's classifiers: 2:4 sparsity, 4-bit weights. Their last layer's name says
# nothing about predictions, so the rule for it stands here.
recipe = dict(
    weight=dict(sparsity='2:4', bits=4),
    rules=[dict(match='head', weight=dict(sparsity=None, bits=8))],
)
regularizer = dict(type='cosine', weight=1.0)
