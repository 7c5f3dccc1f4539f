"""Detectors with a teacher: the student is compressed, the teacher stays dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detector_configs import distillation, soft_teacher
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

import slope_mm
from slope_mm import ConfigError, compressed_layers
from slope_mm.engine import launch

MakeConfig = Callable[..., Config]
MOMENTUM = 0.1


class Students(tiny.Observer):
    """Keeps the student's parameters of every iteration, the first included."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def before_train(self, runner: Any) -> None:
        self._keep(runner.model.student)

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self._keep(runner.model.student)

    def _keep(self, student: nn.Module) -> None:
        self.seen.append({name: p.detach().clone() for name, p in student.named_parameters()})


@pytest.fixture(scope='module')
def students() -> Students:
    return Students()


@pytest.fixture(scope='module')
def semi_run(
    tiny_config: MakeConfig,
    dense_run: tiny.Run,
    students: Students,
    tmp_path_factory: pytest.TempPathFactory,
) -> tiny.Run:
    """A SoftTeacher that starts from a plain detector's checkpoint, as tools/train.py trains it."""
    config = tiny_config(tmp_path_factory.mktemp('semi'), validate=False)
    config = soft_teacher(config)
    config.load_from = str(dense_run.checkpoint)
    launch.check_before_training(config)
    return tiny.train(config, students)


def test_the_student_is_compressed_and_the_teacher_dense(semi_run: tiny.Run) -> None:
    names = compressed_layers(semi_run.model)
    assert len(names) > 25
    assert all(name.startswith('student.') for name in names)
    rows = {row.name: row for row in slope_mm.report(semi_run.model)}
    assert rows['teacher.backbone.layer1.0.conv1'].note == 'excluded by a rule'
    assert not [name for name, _ in semi_run.model.teacher.named_parameters() if 'slope_' in name]


def test_both_losses_train_the_student(semi_run: tiny.Run, students: Students) -> None:
    for row in tiny.read_losses(semi_run.config.work_dir):
        assert row['sup_loss_cls'] > 0
        assert row['unsup_loss_cls'] > 0, 'the teacher found nothing'
        assert row['slope_loss'] > 0
    first, *_, last = students.seen
    moved = tiny.differing(first, last)
    assert 'backbone.layer3.0.conv1.weight' in moved
    assert 'backbone.layer3.0.conv1.slope_step' in moved


def test_the_teacher_is_the_average_of_the_students(semi_run: tiny.Run, students: Students) -> None:
    first, *rest = students.seen
    assert len(rest) == 2
    for name, teacher in semi_run.model.teacher.named_parameters():
        wanted = first[name].double()
        for student in rest:
            wanted = (1 - MOMENTUM) * wanted + MOMENTUM * student[name].double()
        torch.testing.assert_close(teacher.double(), wanted, rtol=1e-5, atol=1e-7)


def test_mmdets_own_hook_is_refused(semi_run: tiny.Run) -> None:
    """It pairs by order, and would write steps into the teacher's batch norms."""
    config = semi_run.config.copy()
    config.custom_hooks = [dict(type='MeanTeacherHook')]
    with pytest.raises(ConfigError, match=r'by their order.*slope_mm.SlopeMeanTeacherHook'):
        launch.check_before_training(config)


def test_rules_reach_the_teacher_only_by_its_name(semi_run: tiny.Run) -> None:
    config = semi_run.config.model.copy()
    config.recipe.rules = [dict(match='type:Linear', weight=dict(bits=8))]
    names = compressed_layers(tiny.build(Config(dict(model=config))))
    assert not [name for name in names if name.startswith('teacher.')]
    config.recipe.rules = [dict(match='teacher.neck', weight=dict(bits=8))]
    names = compressed_layers(tiny.build(Config(dict(model=config))))
    assert {n.split('.')[1] for n in names if n.startswith('teacher.')} == {'neck'}


@pytest.mark.parametrize('arch', ['KnowledgeDistillationSingleStageDetector', 'LAD'])
def test_distillation_trains_the_student_alone(
    arch: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    if arch == 'LAD':
        pytest.importorskip('sklearn', reason="LAD's heads fit mixtures with scikit-learn")
    config = tiny_config(tmp_path)
    batch = tiny.first_batch(config)
    config.pop('model', None)
    config.model = distillation(tiny_config(tmp_path), arch)
    model = tiny.build(config)
    model.train()
    assert len(compressed_layers(model)) > 20
    assert not compressed_layers(model.teacher_model)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='slope_mm.SlopeOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.01),
            regularizer=dict(type='cosine', weight=1.0),
        ),
    )
    student, teacher = tiny.state_of(model), tiny.state_of(model.teacher_model)
    losses = model.train_step(batch, wrapper)
    assert all(value.isfinite() for value in losses.values())
    assert float(wrapper.last_regularization) > 0
    moved = tiny.differing(student, tiny.state_of(model))
    assert 'bbox_head.cls_convs.0.conv.slope_step' in moved
    assert not [name for name in moved if 'teacher' in name]
    assert not tiny.differing(teacher, tiny.state_of(model.teacher_model))
