"""A backbone, a mean over positions, and a linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from slope_mm.errors import ConfigError

MODES = ('tensor', 'loss', 'predict')


@MODELS.register_module()
class Classifier(BaseModel):
    """Classifies images by the last feature map of any registered backbone.

    Args:
        backbone: Config of a module that gives a feature map ``[N, C, H, W]``, or a tuple of which
            the last one counts; ``mmdet.ResNet`` for instance.
        in_channels: C.
        num_classes: Number of classes.
        data_preprocessor: As in any mmengine model.
        init_cfg: The same.

    Raises:
        ConfigError: If a number is below 1.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        in_channels: int,
        num_classes: int,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        for name, value in (('in_channels', in_channels), ('num_classes', num_classes)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f'Classifier {name}={value!r} is not a number >= 1')
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        # The default rules know prediction layers by such a name.
        self.fc_cls = nn.Linear(in_channels, num_classes)

    def forward(
        self,
        inputs: Tensor,
        data_samples: Tensor | Sequence[int] | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Logits, the loss, or predictions.

        Args:
            inputs: Images ``[N, 3, H, W]``, preprocessed.
            data_samples: Class indices, N of them; needed for the loss.
            mode: ``'tensor'``, ``'loss'`` or ``'predict'``.

        Returns:
            Logits ``[N, classes]``; ``{'loss': cross entropy}``; or for each image a dict of
            ``scores`` ``[classes]`` and, where it is known, ``label``.

        Raises:
            ConfigError: If the mode is unknown, or there is no label for the loss.
        """
        if mode not in MODES:
            raise ConfigError(f'Classifier: mode={mode!r} is unknown; choose one of {list(MODES)}')
        features = self.backbone(inputs)
        last = features[-1] if isinstance(features, (tuple, list)) else features
        logits = self.fc_cls(last.mean((2, 3)))
        if mode == 'tensor':
            return logits
        target = None
        if data_samples is not None:
            target = torch.as_tensor(data_samples, device=logits.device)
        if mode == 'loss':
            if target is None:
                raise ConfigError('Classifier: the loss needs labels, and the batch has none')
            return {'loss': F.cross_entropy(logits, target)}
        known = [None] * len(logits) if target is None else target.tolist()
        scores = logits.detach().softmax(1).cpu()
        return [{'scores': s, 'label': one} for s, one in zip(scores, known, strict=True)]
