# Hand signs of the digits 0 to 9 in `data/sign_digits`, a folder a class below `train` and `val`.
_data = dict(
    type='slope_mm.ImageFolders',
    data_root='data/sign_digits',
    metainfo=dict(classes=tuple('0123456789')),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 32)),
    dict(type='slope_mm.PackImage'),
]
test_pipeline = train_pipeline
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(data_prefix=dict(img_path='train'), pipeline=train_pipeline, **_data),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix=dict(img_path='val'), pipeline=test_pipeline, test_mode=True, **_data),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='slope_mm.TopKAccuracy')
test_evaluator = val_evaluator
