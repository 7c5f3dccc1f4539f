"""The averaged models that hooks keep beside the one in training (EMAHook and its kin)."""

from __future__ import annotations

from typing import Any

from mmengine.model.averaged_model import BaseAveragedModel

from slope_mm.convert import compressed_layers
from slope_mm.layers import CompressedLayer


def averages(runner: Any) -> list[BaseAveragedModel]:
    """The averages of a run; each holds its model as ``module``."""
    return [hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')]


def averaged_layers(runner: Any) -> list[dict[str, CompressedLayer]]:
    """The compressed layers of each averaged model."""
    return [compressed_layers(average.module) for average in averages(runner)]
