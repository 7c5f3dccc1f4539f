# SLOPE: 2:16 sparsity, 4-bit weights.
recipe = dict(weight=dict(sparsity='2:16', bits=4))
regularizer = dict(type='cosine', weight=1.0)
