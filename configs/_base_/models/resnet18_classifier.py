# ResNet-18 as it is, with a head of ten classes.
_base_ = ['./resnet_tiny_classifier.py']
model = dict(
    backbone=dict(
        base_channels=64,
        stem_channels=64,
        num_stages=4,
        strides=(1, 2, 2, 2),
        dilations=(1, 1, 1, 1),
        out_indices=(3,),
    ),
    in_channels=512,
)
