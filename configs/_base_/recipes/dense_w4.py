# Dense low-bit: 4-bit weights, no sparsity, no regularizer.
recipe = dict(weight=dict(sparsity=None, bits=4))
regularizer = dict(type='none')
