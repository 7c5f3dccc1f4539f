# Dense low-bit: 3-bit weights, no sparsity, no regularizer.
recipe = dict(weight=dict(sparsity=None, bits=3))
regularizer = dict(type='none')
