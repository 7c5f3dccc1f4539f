"""Trains towards the fp32 detector's features and predictions as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from slope_mm.convert import compressed_layers
from slope_mm.engine import launch
from slope_mm.engine.distillation import Distillation, DistillationLoss
from slope_mm.errors import ConfigError

# Everything from the image to the class logits of a two-stage detector.
TWO_STAGE = ('backbone', 'neck', 'rpn_head', 'roi_head.bbox_roi_extractor', 'roi_head.bbox_head')


@HOOKS.register_module()
class SlopeDistillationHook(Hook):
    """Adds ``loss_distill_features`` and ``loss_distill_logits`` to a model's losses.

    Note:
        The teacher is a dense model of its own, in evaluation mode and without gradients; neither
        the model's class nor its state dict changes. Its modules run on the student's batches and,
        behind the proposals, on the student's regions. A step costs the teacher's forward on top.

    Args:
        config (str): The teacher's config: the dense detector's.
        checkpoint (str): Its trained weights.
        mirrored (sequence of str): Modules that the teacher runs. Defaults to those of a two-stage
            detector; ``['backbone', 'neck', 'bbox_head']`` for a one-stage one. With
            ``'roi_head.mask_roi_extractor'`` and ``'roi_head.mask_head'`` masks are compared too.
        features (sequence of str): Of these, the ones whose outputs are compared. Defaults to
            ``['neck']``.
        logits (sequence of str): The ones whose class logits are. Defaults to all heads mirrored.
        feature_weight (float): Factor of the relative squared difference of features. Defaults
            to 1.
        logit_weight (float): Factor of the divergence of predictions. Defaults to 1.
        temperature (float): Of the predictions. Defaults to 2.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        config: str,
        checkpoint: str,
        mirrored: Sequence[str] = TWO_STAGE,
        features: Sequence[str] = ('neck',),
        logits: Sequence[str] | None = None,
        feature_weight: float = 1.0,
        logit_weight: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        for name, value in (('feature_weight', feature_weight), ('logit_weight', logit_weight)):
            if not 0 <= value < float('inf'):
                raise ConfigError(f'SlopeDistillationHook {name}={value!r} is not a number >= 0')
        if not 0 < temperature < float('inf'):
            raise ConfigError(
                f'SlopeDistillationHook temperature={temperature!r} is not a number > 0'
            )
        self.config, self.checkpoint = str(config), str(checkpoint)
        self.mirrored = tuple(mirrored)
        if logits is None:
            logits = [name for name in self.mirrored if name.rsplit('.', 1)[-1].endswith('_head')]
        self.loss = DistillationLoss(
            tuple(features) if feature_weight else (),
            tuple(logits) if logit_weight else (),
            float(feature_weight),
            float(logit_weight),
            float(temperature),
        )
        if not self.loss.features and not self.loss.logits:
            raise ConfigError(
                'SlopeDistillationHook compares nothing; give features or logits a weight > 0'
            )
        self._distillation: Distillation | None = None

    def before_train(self, runner: Any) -> None:
        """Builds the teacher and attaches it."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        teacher = launch.build_model(launch.read_config(self.config))
        if compressed_layers(teacher):
            raise ConfigError(
                f"SlopeDistillationHook: '{self.config}' is the config of a compressed model; give"
                " the dense detector's"
            )
        launch.load_weights(teacher, self.checkpoint)
        device = next(model.parameters()).device
        self._distillation = Distillation(model, teacher.to(device), self.mirrored, self.loss)

    def after_train(self, runner: Any) -> None:
        """Detaches the teacher."""
        if self._distillation is not None:
            self._distillation.detach()
            self._distillation = None
