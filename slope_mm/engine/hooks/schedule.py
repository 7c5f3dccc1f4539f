"""What changes over training: lambda, when masks move, the way to the target N:M."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.engine.averaging import averaged_layers
from slope_mm.engine.optim_wrapper import RegularizedOptimWrapper
from slope_mm.engine.schedules import (
    decay_factor,
    point_in_training,
    ramped_density,
    ramped_kept,
    warmup_factor,
)
from slope_mm.errors import ConfigError
from slope_mm.layers import CompressedLayer
from slope_mm.ops import NMPattern, Pattern, UnstructuredPattern


@HOOKS.register_module()
class SlopeScheduleHook(Hook):
    """Schedules lambda and the masks.

    Points in training are numbers of iterations (int) or shares of the training (float).

    Note:
        A held or frozen mask is saved with the checkpoint and comes back on resume. EMA models get
        the same masks.

    Args:
        warmup (int | float): lambda rises linearly from 0 until here. Defaults to 0.
        decay_from (int | float, optional): From here on lambda falls linearly, to 0 at the end of
            training. Defaults to None.
        mask_interval (int): Iterations between two looks at which weights to keep; 1 looks in every
            iteration. Defaults to 1.
        freeze_at (int | float, optional): From here on masks stay as they are. Defaults to None.
        ramp_until (int | float): The pattern is approached from dense until here. Defaults to 0.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        warmup: int | float = 0,
        mask_interval: int = 1,
        freeze_at: int | float | None = None,
        ramp_until: int | float = 0,
        decay_from: int | float | None = None,
    ) -> None:
        if not isinstance(mask_interval, int) or mask_interval < 1:
            raise ConfigError(
                f'SlopeScheduleHook mask_interval={mask_interval!r} is not a number of iterations'
                ' >= 1'
            )
        for what, value in (
            ('warmup', warmup),
            ('freeze_at', freeze_at),
            ('ramp_until', ramp_until),
            ('decay_from', decay_from),
        ):
            point_in_training(value, 1, f'SlopeScheduleHook {what}')
        self.warmup, self.freeze_at, self.ramp_until = warmup, freeze_at, ramp_until
        self.mask_interval, self.decay_from = mask_interval, decay_from
        self._ramp = 0

    def before_train(self, runner: Any) -> None:
        """Turns shares of the training into iterations."""
        length = runner.max_iters
        self._warmup = point_in_training(self.warmup, length, 'warmup') or 0
        self._length = length
        self._decay = point_in_training(self.decay_from, length, 'decay_from')
        self._freeze = point_in_training(self.freeze_at, length, 'freeze_at')
        # The last iteration at the latest: whatever is saved has the target pattern.
        ramp = point_in_training(self.ramp_until, length, 'ramp_until') or 0
        self._ramp = min(ramp, length - 1)
        if self._freeze is not None and self._freeze < self._ramp:
            raise ConfigError(
                f'SlopeScheduleHook freezes masks at iteration {self._freeze}, before the ramp ends'
                f' at {self._ramp}; freeze later'
            )
        if self.mask_interval == 1 and not self._frozen(runner.iter):
            # The checkpoint that training starts from may have brought held masks.
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            for layers in (compressed_layers(model), *averaged_layers(runner)):
                for layer in layers.values():
                    layer.release_mask()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets lambda's factor and the masks of this iteration."""
        iteration = runner.iter
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, RegularizedOptimWrapper):
            wrapper.regularizer.scale = min(
                warmup_factor(iteration, length=self._warmup),
                decay_factor(iteration, begin=self._decay, length=self._length),
            )
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if self._ramp:
            self._set_patterns(model, iteration)
        frozen = self._frozen(iteration)
        if frozen or self.mask_interval > 1:
            # A mask that is held over the ramp's end would miss the target pattern.
            refresh = iteration == self._ramp > 0
            refresh |= not frozen and iteration % self.mask_interval == 0
            self._hold(model, averaged_layers(runner), refresh)

    def before_val_epoch(self, runner: Any) -> None:
        """Evaluates what a checkpoint of now loads as: with the target pattern, also in a ramp."""
        if self._ramp:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self._set_patterns(model, self._ramp)

    def _frozen(self, iteration: int) -> bool:
        return self._freeze is not None and iteration >= self._freeze

    def _set_patterns(self, model: nn.Module, iteration: int) -> None:
        for layer in compressed_layers(model).values():
            target = layer.slope_spec.pattern
            if target is not None:
                layer.set_pattern(ramped_pattern(target, iteration, self._ramp))

    @staticmethod
    def _hold(model: nn.Module, averaged: list[dict[str, CompressedLayer]], refresh: bool) -> None:
        for name, layer in compressed_layers(model).items():
            if layer.slope_spec.pattern is None or (layer.slope_mask is not None and not refresh):
                continue
            layer.hold_mask()
            mask = layer.mask
            for layers in averaged:
                layers[name].slope_mask = None if mask is None else mask.clone()


def ramped_pattern(target: Pattern, iteration: int, length: int) -> Pattern | None:
    """The pattern of an iteration on the way from dense to ``target``; None while dense."""
    if isinstance(target, NMPattern):
        kept = ramped_kept(iteration, length=length, n=target.n, m=target.m)
        return None if kept == target.m else NMPattern(kept, target.m)
    if isinstance(target, UnstructuredPattern):
        density = ramped_density(iteration, length=length, density=target.density)
        return None if density == 1 else UnstructuredPattern(density)
    return target
