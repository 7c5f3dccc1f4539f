# Dense low-bit: 4-bit weights and activations, no sparsity, no regularizer.
recipe = dict(weight=dict(sparsity=None, bits=4), activation=dict(bits=4))
regularizer = dict(type='none')
