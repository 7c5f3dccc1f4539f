# The small Mask R-CNN on shapes and on nuclei: the tasks of most studies.
_metrics = dict(box_mAP='coco/bbox_mAP', mask_mAP='coco/segm_mAP')


def _schedule(epochs, eta_min=1e-6, **warm_up):
    return {
        'train_cfg.max_epochs': epochs,
        'param_scheduler': [
            dict(type='LinearLR', by_epoch=False, begin=0, **warm_up),
            dict(
                type='CosineAnnealingLR',
                by_epoch=True,
                T_max=epochs,
                eta_min=eta_min,
                convert_to_iter_based=True,
            ),
        ],
    }


_fine_tuning = dict(start_factor=0.1, end=25)
tasks = dict(
    # 125 iterations an epoch.
    shapes=dict(
        title='shapes',
        config='configs/mask_rcnn_r18_shapes_fp32.py',
        start=dict(config='configs/mask_rcnn_r18_shapes_scratch.py'),
        options=_schedule(3, **_fine_tuning),
        shapes=dict(root='data/shapes'),
        metrics=_metrics,
    ),
    # 50 iterations an epoch.
    nuclei=dict(
        title='nuclei',
        config='configs/mask_rcnn_r18_nuclei_fp32.py',
        start=dict(config='configs/mask_rcnn_r18_nuclei_scratch.py'),
        options=_schedule(4, **_fine_tuning),
        metrics=_metrics,
    ),
)
# The start of shapes is far from converged: fp32 itself gains in the three epochs. How much does
# compression cost from a start of twice as many epochs?
_trained = dict(
    tasks['shapes'],
    title='shapes, start of 24 epochs',
    start=dict(
        config='configs/mask_rcnn_r18_shapes_scratch.py',
        options=_schedule(24, eta_min=1e-5, start_factor=0.01, end=50),
    ),
    seeds=[0, 1, 2],
)
# Does time bring back what three epochs do not?
_trained_long = dict(
    _trained,
    title='shapes, start of 24 epochs, six epochs',
    options=_schedule(6, **_fine_tuning),
    seeds=[0, 1, 2, 3, 4],
)
# For studies with many arms.
_trained_short = dict(
    _trained,
    title='shapes, start of 24 epochs, two epochs',
    options=_schedule(2, **_fine_tuning),
)
