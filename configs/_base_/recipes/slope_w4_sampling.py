# SLOPE: 2:4 sparsity, 4-bit weights; for deformable attention: a small error in where it
# looks moves every sample.
recipe = dict(
    weight=dict(sparsity='2:4', bits=4),
    rules=[
        dict(match='re:.*sampling_offsets', weight=dict(sparsity=None, bits=8)),
    ],
)
regularizer = dict(type='cosine', weight=1.0)
