# The small Mask R-CNN on shapes and on nuclei: the tasks of most studies.
_metrics = dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP')


def _schedule(epochs):
    return {
        'train_cfg.max_epochs': epochs,
        'param_scheduler': [
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=25),
            dict(
                type='CosineAnnealingLR',
                by_epoch=True,
                T_max=epochs,
                eta_min=1e-6,
                convert_to_iter_based=True,
            ),
        ],
    }


tasks = dict(
    # 125 iterations an epoch.
    shapes=dict(
        title='shapes',
        config='configs/mask_rcnn_r18_shapes_fp32.py',
        start=dict(config='configs/mask_rcnn_r18_shapes_scratch.py'),
        options=_schedule(3),
        shapes=dict(root='data/shapes'),
        metrics=_metrics,
    ),
    # 50 iterations an epoch.
    nuclei=dict(
        title='nuclei',
        config='configs/mask_rcnn_r18_nuclei_fp32.py',
        start=dict(config='configs/mask_rcnn_r18_nuclei_scratch.py'),
        options=_schedule(4),
        metrics=_metrics,
    ),
)
