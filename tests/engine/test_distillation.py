"""Distillation: losses against their formulas, and a teacher that looks at the same regions."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from slope_mm import ConfigError, SlopeDistillationHook
from slope_mm.engine.distillation import (
    FEATURES,
    LOGITS,
    Distillation,
    DistillationLoss,
    by_class,
    feature_loss,
    logit_loss,
    uses_sigmoid,
)
from slope_mm.engine.hooks.distillation import TWO_STAGE

MakeConfig = Callable[..., Config]
HEADS = ('rpn_head', 'roi_head.bbox_head')


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- losses --------------------------------------------------------------------------------------


def test_the_feature_loss_is_the_mean_relative_difference() -> None:
    student, teacher = (
        [noise(2, 3, 4, 4), noise(2, 3, 2, 2)],
        [noise(2, 3, 4, 4, seed=1), noise(12)],
    )
    teacher[1] = teacher[1].reshape(12)[:12].new_ones(2, 3, 2, 2)
    expected = np.mean(
        [
            np.sum((s.numpy() - t.numpy()) ** 2) / np.sum(t.numpy() ** 2)
            for s, t in zip(student, teacher, strict=True)
        ]
    )
    assert float(feature_loss(student, teacher)) == pytest.approx(float(expected), rel=1e-5)
    assert float(feature_loss(teacher, teacher)) == 0


@pytest.mark.parametrize('sigmoid', [True, False])
@pytest.mark.parametrize('shape', [(5, 4), (2, 3, 4, 4)])
def test_the_logit_loss_is_the_divergence_of_softened_predictions(
    sigmoid: bool, shape: tuple[int, ...]
) -> None:
    student, teacher, temperature = noise(*shape), noise(*shape, seed=1), 2.0
    s, t = (x.double().numpy() / temperature for x in (student, teacher))
    if sigmoid:
        p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    else:
        p = np.exp(t) / np.exp(t).sum(1, keepdims=True)
        q = np.exp(s) / np.exp(s).sum(1, keepdims=True)
        each = (p * np.log(p / q)).sum(1)
    expected = temperature**2 * each.mean()
    assert float(logit_loss(student, teacher, temperature, sigmoid)) == pytest.approx(expected)
    assert float(logit_loss(student, student, temperature, sigmoid)) == pytest.approx(0, abs=1e-6)


# --- a detector ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp('unused'), 'mask_rcnn_r18_shapes_fp32')


def losses_of(student: nn.Module, teacher: nn.Module, config: Config) -> dict[str, float]:
    loss = DistillationLoss(('neck',), HEADS)
    distillation = Distillation(student, teacher, TWO_STAGE, loss)
    detector: Any = student
    data = detector.data_preprocessor(tiny.first_batch(config), True)
    torch.manual_seed(0)
    losses = detector._run_forward(data, mode='loss')
    distillation.detach()
    return {key: losses[key].item() for key in (FEATURES, LOGITS)}


def test_a_teacher_with_the_same_weights_has_nothing_to_teach(
    config: Config, dense_run: tiny.Run
) -> None:
    """Behind the proposals as well: the teacher's boxes would be others than the samples."""
    student = tiny.build(config)
    student.load_state_dict(dense_run.model.state_dict())
    # Batch norms of a teacher are in evaluation mode.
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    found = losses_of(student, copy.deepcopy(student), config)
    assert found[FEATURES] == pytest.approx(0, abs=1e-8)
    assert found[LOGITS] == pytest.approx(0, abs=1e-5)
    # A change of the last layer alone is seen in the logits alone.
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.roi_head.bbox_head.fc_cls.weight.mul_(-3)
    found = losses_of(student, teacher, config)
    assert found[FEATURES] == pytest.approx(0, abs=1e-8) and found[LOGITS] > 1e-4


def test_masks_are_compared_pixel_by_pixel(config: Config) -> None:
    student = tiny.build(config).eval()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.roi_head.mask_head.conv_logits.weight.mul_(-3)
    student.training = True
    seen: dict[str, torch.Tensor] = {}
    for whose, model in (('student', student), ('teacher', teacher)):
        model.roi_head.mask_head.register_forward_hook(
            lambda _, args, output, whose=whose: seen.update({whose: output.detach()})
        )
    names = ('roi_head.mask_roi_extractor', 'roi_head.mask_head')
    loss = DistillationLoss((), names[1:])
    distillation = Distillation(student, teacher, (*TWO_STAGE, *names), loss)
    detector: Any = student
    data = detector.data_preprocessor(tiny.first_batch(config), True)
    found = detector._run_forward(data, mode='loss')[LOGITS].item()
    distillation.detach()
    # One decision a pixel and class, as the head's own loss has it.
    q, p = (
        torch.distributions.Bernoulli(logits=seen[whose].double() / 2)
        for whose in ('student', 'teacher')
    )
    expected = 4 * torch.distributions.kl_divergence(p, q).mean().item()
    assert found == pytest.approx(expected, rel=1e-4) and found > 1e-3


def test_every_head_of_a_cascade_is_compared(config: Config) -> None:
    config = copy.deepcopy(config)
    roi = config.model.roi_head
    roi.update(mask_head=None, mask_roi_extractor=None)
    roi.update(type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 0.5])
    roi.bbox_head = [copy.deepcopy(roi.bbox_head) for _ in range(2)]
    config.model.type = 'CascadeRCNN'
    config.model.train_cfg.rcnn = [config.model.train_cfg.rcnn] * 2
    student = tiny.build(config).eval()
    # Sampled regions and their images' batch norms are alike on both sides.
    student.training = True
    for last in (0, 1):
        teacher = copy.deepcopy(student)
        assert losses_of(student, teacher, config)[LOGITS] == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            teacher.roi_head.bbox_head[last].fc_cls.weight.mul_(-3)
        assert losses_of(student, teacher, config)[LOGITS] > 1e-4
        student.training = True


def test_classes_of_an_anchor_are_a_decision() -> None:
    """SSD's softmax is over the classes of one anchor; its channels hold those of several."""
    init_default_scope('mmdet')
    anchors = dict(
        type='SSDAnchorGenerator',
        input_size=300,
        basesize_ratio_range=(0.15, 0.9),
        strides=[8, 16, 32, 64, 100, 300],
        ratios=[[2], [2, 3], [2, 3], [2, 3], [2], [2]],
    )
    head = MODELS.build(
        dict(type='SSDHead', num_classes=4, in_channels=(8,) * 6, anchor_generator=anchors)
    )
    student, teacher = (head([noise(2, 8, 3, 5, seed=seed)] * 6)[0][0] for seed in (0, 1))
    assert student.shape == (2, 4 * 5, 3, 5)
    # How the head's own loss sees them (mmdet's SSDHead.loss_by_feat).
    own = [x.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels) for x in (student, teacher)]
    expected = logit_loss(*own, 2.0, sigmoid=False)
    found = logit_loss(by_class(student, head), by_class(teacher, head), 2.0, sigmoid=False)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(logit_loss(student, teacher, 2.0, sigmoid=False)) != pytest.approx(
        float(expected), rel=0.01
    )
    assert not uses_sigmoid(head)


def test_heads_say_what_their_logits_are(config: Config) -> None:
    model = tiny.build(config)
    assert uses_sigmoid(model.rpn_head) and not uses_sigmoid(model.roi_head.bbox_head)


@pytest.mark.parametrize(
    ('losses', 'sigmoid'),
    [
        (dict(loss_mask=dict(use_mask=True)), True),
        (dict(loss_mask=dict(use_mask=False, use_sigmoid=True)), True),
        (dict(loss_point=dict(use_mask=True)), True),
        (dict(loss_mask=dict(use_mask=False), loss_cls=dict(use_sigmoid=True)), True),
        (dict(loss_cls=dict(use_sigmoid=False)), False),
    ],
)
def test_a_heads_losses_say_what_its_logits_are(losses: dict[str, Any], sigmoid: bool) -> None:
    head = nn.Module()
    for name, options in losses.items():
        setattr(head, name, types.SimpleNamespace(**options))
    assert uses_sigmoid(head) == sigmoid


def test_a_detector_trains_with_its_teacher(
    tiny_config: MakeConfig, dense_run: tiny.Run, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path,
        'mask_rcnn_r18_shapes_slope_w4',
        validate=False,
        load_from=str(dense_run.checkpoint),
    )
    hook = dict(
        type='slope_mm.SlopeDistillationHook',
        config=str(dense_run.file),
        checkpoint=str(dense_run.checkpoint),
    )
    config.custom_hooks = [*config.custom_hooks, hook]
    run = tiny.train(config)
    rows = tiny.read_losses(tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert row[FEATURES] > 0 and row[LOGITS] > 0
        parts = [value for key, value in row.items() if key.startswith('loss_')]
        assert row['loss'] == pytest.approx(sum(parts), rel=1e-4)
    # Nothing of the teacher stays in the model.
    assert not any('teacher' in key for key in run.model.state_dict())
    assert not run.model.neck._forward_hooks and not run.model.rpn_head._forward_hooks


@pytest.mark.parametrize(
    ('mirrored', 'loss', 'message'),
    [
        (('backbone', 'nek'), DistillationLoss((), ()), "no module 'nek'"),
        (('backbone',), DistillationLoss(('neck',), ()), 'not among the mirrored modules'),
    ],
)
def test_names_that_are_wrong_are_refused(
    config: Config, mirrored: tuple[str, ...], loss: DistillationLoss, message: str
) -> None:
    model = tiny.build(config)
    with pytest.raises(ConfigError, match=message):
        Distillation(model, copy.deepcopy(model), mirrored, loss)


def test_features_of_a_module_that_nobody_calls_are_refused(config: Config) -> None:
    """A two-stage detector calls methods of its roi_head, never its forward."""
    student = tiny.build(config).train()
    names = (*TWO_STAGE, 'roi_head')
    loss = DistillationLoss(('roi_head',), ())
    distillation = Distillation(student, copy.deepcopy(student), names, loss)
    data = student.data_preprocessor(tiny.first_batch(config), True)
    with pytest.raises(ConfigError, match="features of 'roi_head', whose forward nobody called"):
        student._run_forward(data, mode='loss')
    distillation.detach()


def test_a_gap_between_mirrored_modules_is_named(config: Config) -> None:
    student = tiny.build(config).train()
    teacher = copy.deepcopy(student)
    distillation = Distillation(
        student, teacher, ('backbone', 'rpn_head'), DistillationLoss((), ('rpn_head',))
    )
    data = student.data_preprocessor(tiny.first_batch(config), True)
    with pytest.raises(ConfigError, match="'rpn_head' gets a tensor that none of the mirrored"):
        student._run_forward(data, mode='loss')
    distillation.detach()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(feature_weight=-1), 'feature_weight=-1'),
        (dict(temperature=0), 'temperature=0'),
        (dict(feature_weight=0, logit_weight=0), 'compares nothing'),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlopeDistillationHook('config.py', 'model.pth', **options)


class Regions(nn.Module):
    """The first so many rows."""

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x[:count]


class Branched(BaseModel):
    """A batch norm, and two heads of which the second gets some rows, none, or is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.regions = Regions()
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor, count: int | None = 2, mode: str = 'loss') -> Any:
        x = self.backbone(inputs)
        if count is not None:
            self.second(self.regions(x, count))
        return {'loss': self.first(x).mean()}


def branched() -> tuple[Branched, Branched, Distillation]:
    torch.manual_seed(0)
    student, teacher = Branched().train(), Branched().train()
    names = ('backbone', 'regions', 'first', 'second')
    return student, teacher, Distillation(student, teacher, names, DistillationLoss((), names[2:]))


@pytest.mark.parametrize('count', [2, 0, None])
def test_heads_of_a_teacher_in_evaluation_mode_are_compared(count: int | None) -> None:
    """A head without a region, or that was not called, adds nothing."""
    student, teacher, _ = branched()
    before = copy.deepcopy(teacher.state_dict())
    x = noise(5, 6)
    found = student(x, count=count, mode='loss')[LOGITS].item()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())

    linear, norm = student.backbone
    s = F.batch_norm(linear(x), None, None, norm.weight, norm.bias, training=True)
    # Running statistics as they were at first.
    t = teacher.backbone[0](x) / np.sqrt(1 + 1e-5)
    divergences = []
    for name, rows in (('first', 5), ('second', count)):
        if rows:
            q, p = (
                torch.distributions.Categorical(logits=getattr(model, name)(y[:rows]) / 2)
                for model, y in ((student, s), (teacher, t))
            )
            divergences.append(4 * torch.distributions.kl_divergence(p, q).mean().item())
    assert found == pytest.approx(np.mean(divergences), rel=1e-4)


def test_a_teacher_rests_where_nothing_is_trained() -> None:
    student, teacher, distillation = branched()
    ran: list[bool] = []
    teacher.backbone.register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        assert LOGITS not in student(noise(5, 6), mode='loss')
    assert LOGITS not in student(noise(5, 6), mode='predict')
    assert not ran
    assert LOGITS in student(noise(5, 6), mode='loss')
    # As in an evaluation that calls a part of the model alone.
    student.backbone(noise(5, 6))
    assert len(ran) == 1
    distillation.detach()


def test_logits_of_which_a_head_does_not_say_the_classes_stay_as_they_are() -> None:
    logits = noise(2, 10, 3, 3)
    for classes in (None, 0, 4):
        head = nn.Module()
        head.cls_out_channels = classes
        assert by_class(logits, head) is logits
