"""A detector's heavy parts as modules that take one tensor: what becomes ONNX, and what stays.

Backbone, neck and dense head are one part; the RoI heads of a two-stage detector are parts of
their own, on RoI features. Proposals, RoIAlign and NMS stay mmdet's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from torch import Tensor, nn

from slope_mm.errors import ExportError

DENSE = 'dense'
ROI_HEADS = ('StandardRoIHead', 'CascadeRoIHead', 'DynamicRoIHead')
# Names of the dynamic axes of each part's input.
DENSE_AXES = {0: 'batch', 2: 'height', 3: 'width'}
ROI_AXES = {0: 'rois'}


@dataclass(frozen=True)
class Part:
    """A heavy part of a detector.

    Attributes:
        name: ``'dense'``, or the name of a RoI head in the detector.
        module: Takes one tensor and returns nested tuples and lists of tensors.
        input_name: What the graph calls its input.
        axes: Dynamic axes of the input.
    """

    name: str
    module: nn.Module
    input_name: str
    axes: dict[int, str]


class DenseForward(nn.Module):
    """Backbone, neck and dense head of a detector.

    Args:
        detector: A single-stage or two-stage detector.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        """``(features, head outputs)``; no features where nothing but the head wants them."""
        detector: Any = self.detector
        features = detector.extract_feat(images)
        outputs = dense_head(detector)(features)
        return (tuple(features) if has_rois(detector) else (), outputs)


class FlatForward(nn.Module):
    """A part whose outputs are a flat tuple, as a graph's are."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(self.part(x)))


def has_rois(detector: nn.Module) -> bool:
    """Whether a detector has a second stage."""
    return isinstance(detector, TwoStageDetector)


def dense_head(detector: Any) -> nn.Module:
    """The head that runs on whole feature maps."""
    return detector.rpn_head if has_rois(detector) else detector.bbox_head


def detector_parts(detector: nn.Module) -> list[Part]:
    """The parts of a detector.

    Args:
        detector: Compressed or plain.

    Raises:
        ExportError: If it is no single-stage or two-stage detector, or something that has weights
            would stay outside of all parts.
    """
    if not isinstance(detector, (SingleStageDetector, TwoStageDetector)):
        raise ExportError(
            f'{type(detector).__name__} is neither a single-stage nor a two-stage detector; those'
            ' can be exported, e.g. RetinaNet, FCOS, Faster R-CNN and Mask R-CNN'
        )
    head_name = 'rpn_head' if has_rois(detector) else 'bbox_head'
    head = getattr(detector, head_name, None)
    if head is None or type(head).forward is nn.Module.forward:
        raise ExportError(
            f'{type(detector).__name__} has no {head_name}'
            + ('' if head is None else f' with a forward ({type(head).__name__} has none)')
            + ', and cannot be exported; write a packed file'
        )
    parts = [Part(DENSE, DenseForward(detector), 'images', DENSE_AXES)]
    if has_rois(detector):
        roi_head: Any = detector.roi_head
        if type(roi_head).__name__ not in ROI_HEADS:
            raise ExportError(
                f'roi_head is a {type(roi_head).__name__}, whose heads take more than RoI features;'
                f' {", ".join(ROI_HEADS)} can be exported'
            )
        parts += [Part(name, module, 'features', ROI_AXES) for name, module in roi_heads(detector)]
    _refuse_leftovers(detector, parts)
    return parts


def roi_heads(detector: Any) -> Iterator[tuple[str, nn.Module]]:
    """Box and mask heads by name, one a stage."""
    for kind in ('bbox_head', 'mask_head'):
        head = getattr(detector.roi_head, kind, None)
        if isinstance(head, nn.ModuleList):
            for stage, module in enumerate(head):
                yield f'roi_head.{kind}.{stage}', module
        elif head is not None:
            yield f'roi_head.{kind}', head


def _refuse_leftovers(detector: nn.Module, parts: Sequence[Part]) -> None:
    covered = ['backbone', 'neck', 'rpn_head' if has_rois(detector) else 'bbox_head']
    covered += [part.name for part in parts if part.name != DENSE]
    for name, _ in detector.named_parameters():
        if not any(name.startswith(f'{prefix}.') for prefix in covered):
            raise ExportError(
                f"'{name}' belongs to no part that can be exported ({', '.join(covered)})"
            )


# --- nested outputs ------------------------------------------------------------------------------


def flatten(value: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return []
    return [tensor for item in value for tensor in flatten(item)]


def structure_of(value: Any) -> Any:
    """How tensors are nested, as JSON: lists and tuples by name, None, and ``'tensor'``."""
    if isinstance(value, Tensor):
        return 'tensor'
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        kind = 'list' if isinstance(value, list) else 'tuple'
        return {kind: [structure_of(item) for item in value]}
    raise ExportError(
        f'a head returns a {type(value).__name__}; tensors, tuples and lists can be exported'
    )


def unflatten(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of :func:`flatten` for a structure of :func:`structure_of`."""
    if structure is None:
        return None
    if structure == 'tensor':
        return next(tensors)
    ((kind, items),) = structure.items()
    made = [unflatten(item, tensors) for item in items]
    return made if kind == 'list' else tuple(made)


@torch.no_grad()
def capture_inputs(detector: Any, batch: dict[str, Any]) -> dict[str, list[Tensor]]:
    """What each part is given while a detector predicts a batch, by the part's name.

    Every box counts, however low its score, so that mask heads get something to do.

    Args:
        detector: In evaluation mode.
        batch: As a dataloader gives it.
    """
    found: dict[str, list[Tensor]] = {}
    targets = [('backbone', detector.backbone)]
    targets += list(roi_heads(detector)) if has_rois(detector) else []
    handles = [module.register_forward_pre_hook(_recorder(found, name)) for name, module in targets]
    thresholds = getattr(getattr(detector, 'roi_head', None), 'test_cfg', None)
    before = None if thresholds is None else thresholds.get('score_thr')
    try:
        if thresholds is not None:
            thresholds.score_thr = 0.0
        detector.test_step(batch)
    finally:
        if thresholds is not None:
            thresholds.score_thr = before
        for handle in handles:
            handle.remove()
    if 'backbone' in found:
        found[DENSE] = found.pop('backbone')
    return found


def _recorder(found: dict[str, list[Tensor]], name: str) -> Any:
    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].numel():
            found.setdefault(name, []).append(inputs[0].detach().clone())

    return record
