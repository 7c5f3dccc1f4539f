"""``--tta``: test-time augmentation by mmdet's own model wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict

from slope_mm.engine.data_files import datasets_of
from slope_mm.errors import ConfigError

DEFAULT_MODEL = 'DetTTAModel'


def check_tta(config: Config) -> None:
    """Refuses what mmdet's test-time augmentation would stop at in the middle.

    Raises:
        ConfigError: For a model that predicts masks.
    """
    kind = config.get('tta_model', {}).get('type', DEFAULT_MODEL)
    kind = kind if isinstance(kind, str) else kind.__name__
    heads = (config.model, config.model.get('roi_head') or {})
    masks = any(part.get('mask_head') for part in heads) or _scores_masks(config)
    if str(kind).endswith(DEFAULT_MODEL) and masks:
        raise ConfigError(
            f"--tta: mmdet's {DEFAULT_MODEL} merges boxes alone, but this model predicts masks;"
            ' leave the flag out, or set tta_model to one of your own that merges masks'
        )


def _scores_masks(config: Config) -> bool:
    """Whether masks are evaluated: not every model that predicts them has a mask head."""
    evaluators = config.get('test_evaluator') or []
    evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
    metrics = [evaluator.get('metric') or () for evaluator in evaluators]
    return any('segm' in ([m] if isinstance(m, str) else m) for m in metrics)


def use_tta(config: Config) -> None:
    """Wraps the model and the test pipeline for test-time augmentation.

    A config without ``tta_model`` and ``tta_pipeline`` gets mmdet's defaults: every image and its
    mirror image, merged by NMS.
    """
    if 'tta_model' not in config:
        config.tta_model = dict(
            type=DEFAULT_MODEL,
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    datasets = list(datasets_of(config.test_dataloader.dataset))
    if 'tta_pipeline' not in config:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        pack = dict(type='PackDetInputs', meta_keys=(*keys, 'flip', 'flip_direction'))
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pipeline = deepcopy(datasets[0]['pipeline'])
        # Annotations are loaded for the metric, which has its own; flipping them would fail.
        pipeline = [step for step in pipeline if _kind(step) != 'LoadAnnotations']
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
        config.tta_pipeline = pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)
    for dataset in datasets:
        dataset['pipeline'] = config.tta_pipeline  # type: ignore[index]


def _kind(step: Mapping[str, Any]) -> str:
    """A transform's name without its scope; lazy configs name classes."""
    kind = step['type']
    name: str = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition('.')[2]
