"""Starts weight steps by another rule than the default one."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from slope_mm.convert import compressed_layers
from slope_mm.errors import ConfigError, nearest
from slope_mm.ops import STEP_INITS


@HOOKS.register_module()
class SlopeStepInitHook(Hook):
    """Sets all weight steps before training, from the weights that were loaded.

    Note:
        Steps of a compressed checkpoint that training starts from are replaced as well. A resumed
        run keeps its own.

    Args:
        method (str): ``'search'`` (the default without this hook): the step of least squared
            error; ``'lsq'``: LSQ's formula (arXiv 1902.08153); ``'least_squares'``: the formula,
            then rounding and the best step for the codes by turns. Defaults to ``'lsq'``.
    """

    priority = 'HIGH'

    def __init__(self, method: str = 'lsq') -> None:
        if method not in STEP_INITS:
            raise ConfigError(
                f'SlopeStepInitHook method={method!r} is unknown; choose one of'
                f' {list(STEP_INITS)}{nearest(str(method), STEP_INITS)}'
            )
        self.method = method

    @torch.no_grad()
    def before_train(self, runner: Any) -> None:
        """Sets the steps, unless the run was resumed."""
        if runner.iter > 0:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for layer in compressed_layers(model).values():
            codes, step = layer.slope_spec.weight_codes, layer.slope_step
            if codes is None or step is None:
                continue
            axis = layer.output_axis if layer.slope_spec.step == 'channel' else None
            # Under q_then_s every weight is quantized before the mask is known.
            mask = layer.mask if layer.slope_spec.order == 's_then_q' else None
            step.copy_(STEP_INITS[self.method](layer.latent_weight(), codes, axis, mask))
            layer.give_usual_steps()
