"""Configs on the shapes set: ATSS, and detectors with a teacher."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config

BRANCHES = ['sup', 'unsup_teacher', 'unsup_student']
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
PACK = dict(type='PackDetInputs', meta_keys=(*META, 'homography_matrix'))
IMAGE = dict(type='LoadImageFromFile')
LABELED = [
    IMAGE,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64)),
    dict(type='RandomFlip', prob=0.0),
    dict(type='MultiBranch', branch_field=BRANCHES, sup=dict(type='PackDetInputs')),
]
VIEW = [dict(type='Resize', scale=(64, 64)), dict(type='RandomFlip', prob=0.5), PACK]
UNLABELED = [
    IMAGE,
    dict(type='LoadEmptyAnnotations'),
    dict(type='MultiBranch', branch_field=BRANCHES, unsup_teacher=VIEW, unsup_student=VIEW),
]


def soft_teacher(config: Config) -> Config:
    """Turns a tiny Mask R-CNN config into a SoftTeacher around its Faster R-CNN."""
    model = config.model.to_dict()
    recipe = model.pop('recipe')
    detector = dict(model, type='FasterRCNN')
    del detector['arch']
    detector['roi_head'].update(mask_head=None, mask_roi_extractor=None)
    config.pop('model')
    config.model = dict(
        type='slope_mm.SlopeModel',
        arch='SoftTeacher',
        recipe=recipe,
        detector=detector,
        data_preprocessor=dict(
            type='MultiBranchDataPreprocessor', data_preprocessor=detector['data_preprocessor']
        ),
        semi_train_cfg=dict(
            freeze_teacher=True,
            sup_weight=1.0,
            unsup_weight=4.0,
            # A detector that was hardly trained is sure of nothing.
            pseudo_label_initial_score_thr=0.05,
            rpn_pseudo_thr=0.05,
            cls_pseudo_thr=0.05,
            reg_pseudo_thr=10.0,
            jitter_times=2,
            jitter_scale=0.06,
            min_pseudo_bbox_wh=(1e-2, 1e-2),
        ),
        semi_test_cfg=dict(predict_on='student'),
    )
    labeled = config.train_dataloader.dataset.to_dict()
    sources = [dict(copy.deepcopy(labeled), pipeline=steps) for steps in (LABELED, UNLABELED)]
    config.train_dataloader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='GroupMultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
        dataset=dict(type='ConcatDataset', datasets=sources),
    )
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=10)
    config.log_processor.by_epoch = False
    config.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    config.custom_hooks = [
        dict(type='slope_mm.SlopeMeanTeacherHook', momentum=0.1),
        dict(type='slope_mm.SlopeCalibrationHook', batches=1),
        dict(type='slope_mm.SlopeMonitorHook', interval=1, picture=False),
    ]
    return config


def atss(config: Config) -> Config:
    """An ATSS whose losses are means over the global batch: no sampling, batch norms as loaded."""
    neck = dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4)
    model = dict(
        type='slope_mm.SlopeModel',
        arch='ATSS',
        recipe=config.model.recipe.to_dict(),
        data_preprocessor=config.model.data_preprocessor.to_dict(),
        backbone=dict(config.model.backbone.to_dict(), norm_eval=True),
        neck=neck,
        bbox_head=ATSS_HEAD,
        train_cfg=TRAIN,
        test_cfg=TEST,
    )
    config.pop('model')
    config.model = model
    data = config.train_dataloader
    data.sampler.shuffle = False
    data.dataset.pipeline = [s for s in data.dataset.pipeline if s.type != 'RandomFlip']
    # Adam's first steps are signs of gradients, which the last digits may turn.
    config.optim_wrapper.optimizer = dict(type='SGD', lr=0.05)
    config.param_scheduler = []
    return config


def distillation(config: Config, arch: str) -> dict[str, Any]:
    """A small LD or LAD detector in place of a tiny Mask R-CNN; the teacher is its twin."""
    kind, head = {
        'KnowledgeDistillationSingleStageDetector': ('GFL', LD_HEAD),
        'LAD': ('LAD', LAD_HEAD),
    }[arch]
    backbone = config.model.backbone.to_dict()
    neck = dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4)
    teacher_head = dict(head)
    if kind == 'GFL':
        teacher_head['type'] = 'GFLHead'
        del teacher_head['loss_ld']
    cfg = dict(train_cfg=TRAIN if kind == 'GFL' else LAD_TRAIN, test_cfg=TEST)
    teacher: dict[str, Any] = (
        dict(
            teacher_config=dict(
                model=dict(type=kind, backbone=backbone, neck=neck, bbox_head=teacher_head, **cfg)
            )
        )
        if kind == 'GFL'
        else dict(teacher_backbone=backbone, teacher_neck=neck, teacher_bbox_head=teacher_head)
    )
    return dict(
        type='slope_mm.SlopeModel',
        arch=arch,
        recipe=config.model.recipe.to_dict(),
        data_preprocessor=config.model.data_preprocessor.to_dict(),
        backbone=backbone,
        neck=neck,
        bbox_head=head,
        **teacher,
        **cfg,
    )


ANCHORS = dict(
    type='AnchorGenerator',
    ratios=[1.0],
    octave_base_scale=8,
    scales_per_octave=1,
    strides=[4, 8, 16, 32],
)
SMALL = dict(
    num_classes=5, in_channels=16, feat_channels=16, stacked_convs=1, anchor_generator=ANCHORS
)
LD_HEAD = dict(
    SMALL,
    type='LDHead',
    reg_max=8,
    norm_cfg=dict(type='GN', num_groups=4),
    loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
    loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
    loss_ld=dict(type='KnowledgeDistillationKLDivLoss', loss_weight=0.25, T=10),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
)
LAD_HEAD = dict(
    SMALL,
    type='LADHead',
    reg_decoded_bbox=True,
    score_voting=True,
    topk=9,
    norm_cfg=dict(type='GN', num_groups=4),
    bbox_coder=dict(
        type='DeltaXYWHBBoxCoder',
        target_means=[0.0, 0.0, 0.0, 0.0],
        target_stds=[0.1, 0.1, 0.2, 0.2],
    ),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=1.3),
    loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5),
)
ATSS_HEAD = dict(
    SMALL,
    type='ATSSHead',
    norm_cfg=dict(type='GN', num_groups=4),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
)
TRAIN = dict(
    assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False
)
LAD_TRAIN = dict(
    assigner=dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.1,
        neg_iou_thr=0.1,
        min_pos_iou=0,
        ignore_iof_thr=-1,
    ),
    allowed_border=-1,
    pos_weight=-1,
    debug=False,
)
TEST = dict(
    nms_pre=100,
    min_bbox_size=0,
    score_thr=0.05,
    nms=dict(type='nms', iou_threshold=0.6),
    max_per_img=10,
)
