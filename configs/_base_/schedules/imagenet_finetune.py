# Fine-tuning of a published ImageNet classifier: our choice, the paper's schedule is not published.
finetune_epochs = 30
# Under a name of its own: two bases may not set the same key.
finetune_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=finetune_epochs,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
