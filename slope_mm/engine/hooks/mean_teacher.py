"""The averaging teacher of mmdet's semi-supervised detectors, beside a compressed student."""

from __future__ import annotations

from typing import Any

from mmdet.engine.hooks import MeanTeacherHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SlopeMeanTeacherHook(MeanTeacherHook):
    """mmdet's ``MeanTeacherHook`` for a student that has parameters which its teacher has not.

    Note:
        mmdet's pairs parameters by their order, so the learned steps of a compressed student would
        push all others out of place. This one pairs them by name. The teacher is dense by default:
        it becomes the average of the student's latent weights. A teacher that rules of the recipe
        compress too gets the average of its steps as well.

    Args:
        momentum (float): Share of the student in each update. Defaults to 0.001.
        interval (int): Iterations between updates. Defaults to 1.
        skip_buffer (bool): Leave out buffers such as BN statistics. Defaults to True.
    """

    def momentum_update(self, model: Any, momentum: float) -> None:
        """``teacher = (1 - momentum) * teacher + momentum * student``, name by name."""
        if self.skip_buffers:
            students = dict(model.student.named_parameters())
            teachers = dict(model.teacher.named_parameters())
        else:
            students, teachers = model.student.state_dict(), model.teacher.state_dict()
        for name, teacher in teachers.items():
            if teacher.dtype.is_floating_point:
                teacher.data.mul_(1 - momentum).add_(students[name].data, alpha=momentum)
