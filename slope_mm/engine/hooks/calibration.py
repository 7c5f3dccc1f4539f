"""Calibrates input quantizers before training."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from slope_mm.convert import compressed_layers
from slope_mm.engine.averaging import averaged_layers
from slope_mm.engine.calibration import (
    calibrate,
    evenly_spread_batches,
    uncalibrated_layers,
)
from slope_mm.engine.hooks.batch_norm import SlopeBatchNormHook, norms_of
from slope_mm.errors import ConfigError


@HOOKS.register_module()
class SlopeCalibrationHook(Hook):
    """Finds the range and sign of every quantized input on a few training batches.

    Note:
        Images are taken straight from the training data set, evenly spread and different on every
        rank, so neither the order of the training batches nor any random state changes. Ranges are
        pooled over ranks. What a resumed model has calibrated stays as it is. Without this
        hook the first training batch calibrates.

        What sees its first input later (a head without regions) is calibrated then; this hook
        starts its averages (EMAHook's and its kin's) there as well, in place of at a placeholder.

    Args:
        batches (int): Batches per rank. Defaults to 4.
    """

    priority = 'NORMAL'

    def __init__(self, batches: int = 4) -> None:
        if not isinstance(batches, int) or batches < 1:
            raise ConfigError(
                f'SlopeCalibrationHook batches={batches!r} is not a number of batches >= 1'
            )
        self.batches = batches
        self._waiting: list[tuple[str, int]] = []

    def before_train(self, runner: Any) -> None:
        """Calibrates what is not calibrated yet."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._waiting = [
            (name, which)
            for name, layer in uncalibrated_layers(model).items()
            for which in range(layer.inputs)
            if layer.input_signed(which) is None
        ]
        self._calibrate(runner, model)
        # A resumed run has averages of before.
        self._start_averages(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Starts the averages of what this iteration calibrated."""
        self._start_averages(runner)

    def _start_averages(self, runner: Any) -> None:
        if not self._waiting:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers, rest = compressed_layers(model), []
        for name, which in self._waiting:
            layer = layers[name]
            if layer.input_signed(which) is None:
                rest.append((name, which))
                continue
            for averaged in averaged_layers(runner):
                # Where it averages buffers as well, the sign (an integer) would stay behind too.
                for own, theirs in (
                    (averaged[name].slope_act_step, layer.slope_act_step),
                    (averaged[name].slope_act_signed, layer.slope_act_signed),
                ):
                    own.data[which] = theirs.data[which]  # type: ignore[union-attr]
        self._waiting = rest

    def _calibrate(self, runner: Any, model: Any) -> None:
        if not uncalibrated_layers(model):
            return
        loader = runner.train_dataloader
        if not hasattr(loader.dataset, '__getitem__') or not hasattr(loader.dataset, '__len__'):
            runner.logger.warning(
                'SlopeCalibrationHook: the training data cannot be indexed; the first training'
                ' batch calibrates instead'
            )
            return
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        for hook in runner.hooks:
            if isinstance(hook, SlopeBatchNormHook):
                # As the training will have them: that hook's turn is the first iteration.
                hook.set_modes(norms_of(model))
        batches = evenly_spread_batches(loader, self.batches, get_rank(), get_world_size())
        done = calibrate(model, batches)
        for module, mode in modes:
            module.training = mode
        rest = uncalibrated_layers(model)
        runner.logger.info(
            f'SLOPE: calibrated the inputs of {done} layers on {self.batches} batches a rank'
            + (f'; {len(rest)} saw no input yet: {", ".join(list(rest)[:5])}' if rest else '')
        )
