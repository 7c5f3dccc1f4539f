# SLOPE: 2:8 sparsity, 4-bit weights.
recipe = dict(weight=dict(sparsity='2:8', bits=4))
regularizer = dict(type='cosine', weight=1.0)
