# The small Mask R-CNN on shapes, two epochs: for studies with many arms.
tasks = dict(
    shapes=dict(
        title='shapes, two epochs',
        config='configs/mask_rcnn_r18_shapes_fp32.py',
        start=dict(config='configs/mask_rcnn_r18_shapes_scratch.py'),
        options={
            'train_cfg.max_epochs': 2,
            'param_scheduler': [
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=25),
                dict(
                    type='CosineAnnealingLR',
                    by_epoch=True,
                    T_max=2,
                    eta_min=1e-6,
                    convert_to_iter_based=True,
                ),
            ],
        },
        shapes=dict(root='data/shapes'),
        metrics=dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP'),
    ),
)
