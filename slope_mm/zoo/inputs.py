"""Dummy batches: what a model's training and prediction want to be given, and small."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmdet.structures import ReIDDataSample
from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs
from mmengine.config import Config
from mmengine.structures import PixelData

from slope_mm.benchmark.detectors import classes_of

IMAGES = 2
BOXES = 4
# Image sides that are tried, in pixels: some heads want more levels or cells than the first gives,
# MLP-Mixer exactly 224.
SIDES = (64, 128, 224, 320)
# Stride of the semantic map that a part wants.
SEMANTIC: dict[str, int] = {
    'FusedSemanticHead': 8,
    'SCNetSemanticHead': 8,
    'PanopticFPNHead': 4,
    'MaskFormerFusionHead': 1,
}
VIDEO = ('QDTrack', 'MaskTrackRCNN', 'Mask2FormerVideo')
# Height and width of a person's crop, which re-identification averages over as a whole.
CROP = (256, 128)


def types_of(section: Any) -> set[str]:
    """All ``type`` names in a config section, and what a SlopeModel was."""
    if isinstance(section, dict):
        own = {str(section[key]) for key in ('type', 'arch') if key in section}
        return own.union(*map(types_of, section.values()))
    if isinstance(section, (list, tuple)):
        return set().union(*map(types_of, section))
    return set()


def training_batch(config: Config, side: int) -> dict[str, Any]:
    """A batch as the model's training dataloader would collate it.

    Args:
        config: A stock config, or one with a SlopeModel.
        side: Side of its square images, in pixels.

    Returns:
        ``inputs`` and ``data_samples``: images of noise with boxes, masks, semantic maps and
        proposals; clips for models of videos; crops for re-identification; branches for
        semi-supervised ones; images with labels or semantic maps alone for mmpretrain's and
        mmseg's.
    """
    if config.get('default_scope') in OTHER_SAMPLES:
        return _other_images(config, side)
    used = types_of(config.model)
    if 'BaseReID' in used:
        return _crops()
    if used & set(VIDEO):
        return _clips(config, side)
    if 'SoftTeacher' in used:
        names = ('sup', 'unsup_teacher', 'unsup_student')
        branches = {name: _images(config, side) for name in names}
        return {
            key: {name: branch[key] for name, branch in branches.items()}
            for key in ('inputs', 'data_samples')
        }
    return _images(config, side)


def prediction_batch(config: Config, side: int) -> dict[str, Any]:
    """A batch of one image or clip, as the test dataloader would collate it."""
    if config.get('default_scope') in OTHER_SAMPLES:
        batch = _other_images(config, side)
    elif 'BaseReID' in types_of(config.model):
        batch = _crops()
    elif types_of(config.model) & set(VIDEO):
        batch = _clips(config, side)
    else:
        batch = _images(config, side)
    return {key: value[:1] for key, value in batch.items()}


def _images(config: Config, side: int) -> dict[str, Any]:
    used = types_of(config.model)
    masks = _trains_on_masks(config)
    classes = max(classes_of(config), 1)
    batch: dict[str, Any] = demo_mm_inputs(
        IMAGES,
        [(3, side, side)] * IMAGES,
        num_items=[BOXES] * IMAGES,
        # It draws labels from 1 on.
        num_classes=max(classes, 2),
        with_mask=True,
    )
    stride = max([SEMANTIC[kind] for kind in SEMANTIC if kind in used], default=0)
    draw = np.random.RandomState(1)
    for sample in batch['data_samples']:
        sample.set_metainfo(
            dict(
                batch_input_shape=(side, side),
                pad_shape=(side, side),
                scale_factor=(1.0, 1.0),
                homography_matrix=np.eye(3, dtype=np.float32),
            )
        )
        sample.gt_instances.labels %= classes
        if not masks:
            del sample.gt_instances.masks
        # The test above drew them anywhere; training wants boxes with an area.
        sample.gt_instances.bboxes = _with_area(sample.gt_instances.bboxes, side)
        if stride:
            shape = (1, side // stride, side // stride)
            values = draw.randint(0, classes, shape)
            sample.gt_sem_seg = PixelData(sem_seg=torch.from_numpy(values).long())
        if 'FastRCNN' in used:
            sample.proposals = demo_mm_proposals([(3, side, side)], 20)[0]
    return batch


def _trains_on_masks(config: Config) -> bool:
    """Whether the training data bring masks; a config that does not tell is given them.

    Some assigners of boxes look at masks where there are any.
    """
    loaders = list(_sections(config.get('train_dataloader'), 'LoadAnnotations'))
    return not loaders or any(loader.get('with_mask', False) for loader in loaders)


def _sections(section: Any, kind: str) -> Iterator[Mapping[str, Any]]:
    """All sections of one ``type`` in a part of a config."""
    if isinstance(section, Mapping):
        if section.get('type') == kind:
            yield section
        section = list(section.values())
    if isinstance(section, (list, tuple)):
        for value in section:
            yield from _sections(value, kind)


def _label_sample(label: int, side: int) -> Any:
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)


def _map_sample(label: int, side: int) -> Any:
    from mmseg.structures import SegDataSample

    shape = (side, side)
    sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
    # Two classes, half of the image each.
    values = torch.full((1, *shape), label)
    values[..., : side // 2] = 1 - label
    sample.gt_sem_seg = PixelData(data=values)
    return sample


# By default scope: the target of one image, given one of two classes. Their packages are imported
# where a config needs them.
OTHER_SAMPLES = {'mmpretrain': _label_sample, 'mmseg': _map_sample}


def _other_images(config: Config, side: int) -> dict[str, Any]:
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (IMAGES, 3, side, side), dtype=np.uint8)
    sample = OTHER_SAMPLES[config.default_scope]
    return {
        'inputs': list(torch.from_numpy(images)),
        'data_samples': [sample(number % 2, side) for number in range(IMAGES)],
    }


def _crops() -> dict[str, Any]:
    """Two crops of each of two people; the triplet loss wants both kinds of pairs."""
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (2 * IMAGES, 3, *CROP), dtype=np.uint8)
    samples = [ReIDDataSample().set_gt_label(number % 2) for number in range(2 * IMAGES)]
    return {'inputs': list(torch.from_numpy(images)), 'data_samples': samples}


def _with_area(boxes: torch.Tensor, side: int) -> torch.Tensor:
    boxes = boxes.clone()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + side / 8).clamp(max=side)
    boxes[:, :2] = torch.minimum(boxes[:, :2], boxes[:, 2:] - side / 8).clamp(min=0)
    return boxes


def _clips(config: Config, side: int) -> dict[str, Any]:
    batch: dict[str, Any] = demo_track_inputs(
        batch_size=1,
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=(3, side, side),
        num_items=[BOXES],
        num_classes=1,
        with_mask=True,
    )
    for clip in batch['data_samples']:
        for sample in clip.video_data_samples:
            found = sample.gt_instances
            found.bboxes = _with_area(found.bboxes, side)
            # The same objects in every frame.
            found.instances_ids = torch.arange(len(found.bboxes))
            sample.set_metainfo(
                dict(
                    batch_input_shape=(side, side),
                    pad_shape=(side, side),
                    scale_factor=(1.0, 1.0),
                )
            )
    return copy.deepcopy(batch)
