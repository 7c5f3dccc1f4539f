# SLOPE: 2:4 sparsity, 4-bit weights, 4-bit activations.
recipe = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))
regularizer = dict(type='cosine', weight=1.0)
