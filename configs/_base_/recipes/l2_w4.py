# The L2 arm: 2:4 sparsity, 4-bit weights, relative L2 instead of cosine.
recipe = dict(weight=dict(sparsity='2:4', bits=4))
regularizer = dict(type='l2', weight=1.0)
