# Naive: 2:4 sparsity, 4-bit weights and activations (lambda = 0).
recipe = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))
regularizer = dict(type='none')
