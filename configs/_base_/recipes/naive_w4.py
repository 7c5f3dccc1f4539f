# Naive: 2:4 sparsity and 4-bit weights (lambda = 0).
recipe = dict(weight=dict(sparsity='2:4', bits=4))
regularizer = dict(type='none')
