# SLOPE: 2:4 sparsity, 2-bit weights. The levels have no zero, which the mask stores already: closer
# to fp32 on shapes than levels with one (docs/results/README.md).
recipe = dict(weight=dict(sparsity='2:4', bits=2, codes='odd'))
regularizer = dict(type='cosine', weight=1.0)
