# The tiny ResNet on hand signs, eight epochs of SGD: a trial takes seconds.
tasks = dict(
    sign_digits=dict(
        title='sign digits, ResNet 8-16-32',
        config='configs/classification/resnet_tiny_sign_digits_fp32.py',
        start=dict(config='configs/classification/resnet_tiny_sign_digits_scratch.py'),
        metrics=dict(top1='accuracy/top1'),
    ),
)
