"""The dense detector that a config with a recipe starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from slope_mm.engine import launch
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.packed import stock_model
from slope_mm.errors import CheckpointError, ConfigError


def load_dense(config: Config, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the stock model of a config with a SlopeModel and loads dense weights into it.

    Args:
        config: A config with a recipe; it is left as it is.
        checkpoint: A checkpoint of the stock model.

    Returns:
        The model in evaluation mode, and the checkpoint's ``meta``.

    Raises:
        ConfigError: If the config has no recipe.
        CheckpointError: If the checkpoint is missing, compressed already, or another model's.
    """
    init_default_scope(config.get('default_scope') or 'mmdet')
    if 'recipe' not in config.get('model', {}):
        raise ConfigError(
            'the config has no recipe: this is a stock config; make a compressed one with'
            ' tools/slopeify.py'
        )
    refuse_compressed(checkpoint)
    # Stock detectors write into the config that they are built from.
    model = MODELS.build(ConfigDict(stock_model(config.model.to_dict())))
    return model.eval(), launch.load_weights(model, checkpoint)


def refuse_compressed(checkpoint: str) -> None:
    """Refuses a checkpoint that holds compressed layers; others pass, missing ones too.

    Raises:
        CheckpointError: If it does.
    """
    if not Path(checkpoint).expanduser().exists():
        return
    loaded = load_checkpoint_file(checkpoint)
    state = loaded.get('state_dict', loaded) if isinstance(loaded, Mapping) else {}
    if any(str(key).rpartition('.')[2] == 'slope_layer' for key in state):
        raise CheckpointError(
            f"'{checkpoint}' is of a compressed model already; give the dense checkpoint that it"
            ' was started from'
        )
