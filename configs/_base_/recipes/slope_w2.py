# SLOPE: 2:4 sparsity, 2-bit weights.
recipe = dict(weight=dict(sparsity='2:4', bits=2))
regularizer = dict(type='cosine', weight=1.0)
