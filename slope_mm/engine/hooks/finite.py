"""Stops at NaN and infinity, or passes over the iterations in which they appear."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from slope_mm.engine.calibration import (
    restore_buffers,
    saved_buffers,
    undisturbed,
)
from slope_mm.engine.finite import (
    ActivationTrace,
    check_state_finite,
    listed,
    nonfinite,
    nonfinite_data,
    plain,
)
from slope_mm.engine.optim_wrapper import RegularizedOptimWrapper
from slope_mm.errors import ConfigError, TensorError

ACTIONS = ('stop', 'skip')
_LOWER = 'lower the learning rate, clip gradients, or look at the data'


@HOOKS.register_module()
class SlopeFiniteHook(Hook):
    """Names the iteration and the place of the first NaN or infinity, and stops or skips.

    Looked at in every iteration: the batch (images and labels), the loss with the regularizer, the
    gradients, and the parameters after the update. Where the loss is NaN or infinite, the forward
    pass is repeated once to find the first layer that makes it so.

    Note:
        ``'skip'`` leaves parameters, steps, optimizer states and BN statistics as they were. Under
        gradient accumulation the whole update is dropped that the iteration belongs to. All
        processes of a distributed run skip together. Under ``--amp`` infinite gradients are the
        loss scaler's affair, which skips such updates and lowers its scale; losses and data are
        looked at all the same. Parameters that are NaN or infinite cannot be skipped: training
        stops. Nothing of all that reaches a checkpoint: the checkpoint hook comes later, and
        refuses it, too.

    Args:
        action (str): ``'stop'`` ends the training with an error, ``'skip'`` passes over the
            iteration. Defaults to ``'stop'``.
        max_skips (int): That many iterations may be skipped without an update between them.
            Defaults to 10.
        activation_interval (int): Iterations between two looks at all activations: quantizers clip
            an infinite input to a finite one, which no loss betrays. 0 looks only where a loss is
            NaN or infinite. Defaults to 50.
    """

    # Before the model average, the monitor and the checkpoint.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self, action: str = 'stop', max_skips: int = 10, activation_interval: int = 50
    ) -> None:
        if action not in ACTIONS:
            raise ConfigError(f'SlopeFiniteHook action={action!r} is none of {list(ACTIONS)}')
        for name, value, least in (
            ('max_skips', max_skips, 1),
            ('activation_interval', activation_interval, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f'SlopeFiniteHook {name}={value!r} is not a number of iterations >= {least}'
                )
        self.action, self.max_skips = action, max_skips
        self.activation_interval = activation_interval
        self.skipped = 0
        self._in_a_row = 0
        self._trace: ActivationTrace | None = None
        self._handles: list[Any] = []

    # --- the training loop -------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses to start from weights that are not finite."""
        state = checkpoint.get('state_dict', checkpoint)
        check_state_finite(
            plain(runner.model), state, 'the checkpoint', 'start from an earlier one'
        )

    def before_train(self, runner: Any) -> None:
        """Takes its place beside the optim wrapper."""
        self._runner = runner
        self._check_parameters('before the first iteration')
        self._guards = isinstance(runner.optim_wrapper, RegularizedOptimWrapper)
        if self._guards:
            runner.optim_wrapper.guard = self
        elif self.action == 'skip':
            raise ConfigError(
                "SlopeFiniteHook(action='skip') needs an optim wrapper that asks it before an"
                " update; set optim_wrapper.constructor='slope_mm.SlopeOptimWrapperConstructor', or"
                " use action='stop'"
            )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Looks at the batch, and remembers what a skip has to bring back."""
        model = plain(runner.model)
        self._batch, self._found = data_batch, nonfinite_data(data_batch)
        if self.action == 'skip':
            self._buffers = saved_buffers(model)
        self._random = torch.get_rng_state(), np.random.get_state()
        interval = self.activation_interval
        if interval and runner.iter % interval == 0:
            self._trace = ActivationTrace()
            self._handles = self._trace.attach(model)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks at the parameters after the update, and at the loss where nobody else did."""
        self._batch = None
        if not self._guards and isinstance(outputs, dict) and 'loss' in outputs:
            self.admits_loss(torch.as_tensor(outputs['loss']))
        self._check_parameters(f'after iteration {runner.iter + 1}')

    # --- what the optim wrapper asks ---------------------------------------------------------

    def admits_loss(self, loss: Tensor) -> bool:
        """Whether an iteration may be trained on, decided by all processes together.

        Args:
            loss: The loss, regularizer included.

        Raises:
            TensorError: If it may not, and the action is ``'stop'``.
        """
        if self._found is None and self._trace is not None:
            first = self._trace.first()
            self._found = None if first is None else f'NaN or infinity in {first}'
        self._forget_trace()
        value = float(loss.detach().sum())
        fine = self._found is None and math.isfinite(value)
        if get_world_size() > 1:
            verdict = torch.tensor([float(fine)], device=loss.device)
            all_reduce(verdict, 'min')
            fine_everywhere = bool(verdict.item())
        else:
            fine_everywhere = fine
        if fine_everywhere:
            return True
        # Repeated on all ranks or on none: losses may average over them.
        cause = self._cause()
        if fine:
            self._refuse('another process met NaN or infinity')
        else:
            self._refuse(self._found or f'the loss is {value}: {cause}')
        return False

    def admits_gradients(self) -> bool:
        """Whether the gradients may be used; they are those of all processes.

        Raises:
            TensorError: If they may not, and the action is ``'stop'``.
        """
        named = plain(self._runner.model).named_parameters()
        names = nonfinite((name, p.grad) for name, p in named)
        if names:
            self._refuse(f'the gradient of {listed(names)} is NaN or infinite; {_LOWER}')
        return not names

    def updated(self) -> None:
        """Learns that nothing was skipped: a loss alone, or half of an update, does not say so."""
        self._in_a_row = 0

    # --- how ---------------------------------------------------------------------------------

    def _refuse(self, what: str) -> None:
        runner = self._runner
        where = f'iteration {runner.iter + 1} (epoch {runner.epoch + 1}): {what}'
        if self.action == 'stop':
            raise TensorError(f'{where}. Nothing of it was saved')
        self._in_a_row += 1
        if self._in_a_row > self.max_skips:
            raise TensorError(
                f'{where}. {self.max_skips} iterations were skipped already without an update'
                f' between them; {_LOWER}'
            )
        self.skipped += 1
        restore_buffers(self._buffers)
        runner.logger.warning(f'SLOPE skips {where}')

    def _cause(self) -> str:
        """The first place of a repeated forward pass that is not finite."""
        model: Any = plain(self._runner.model)
        if self._batch is None:
            return 'the batch is gone, so its forward pass cannot be repeated'
        with undisturbed(model), ActivationTrace().watching(model) as trace:
            torch.set_rng_state(self._random[0])
            np.random.set_state(self._random[1])
            losses = model._run_forward(model.data_preprocessor(self._batch, True), mode='loss')
        first = trace.first()
        if first is not None:
            return f'NaN or infinity begins in {first}'
        terms = {name: _summed(value) for name, value in losses.items()}
        names = nonfinite(terms.items())
        if names:
            return f'all activations are finite, {listed(names)} is not'
        return 'all activations and losses are finite, so it is the regularizer or their sum'

    def _check_parameters(self, when: str) -> None:
        names = nonfinite(plain(self._runner.model).named_parameters())
        if names:
            raise TensorError(
                f'{when}, {listed(names)} is NaN or infinite, which no skip can mend; go on from'
                f' the last checkpoint and {_LOWER}'
            )

    def _forget_trace(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._trace, self._handles = None, []


def _summed(value: Any) -> Tensor | None:
    parts = value if isinstance(value, (list, tuple)) else [value]
    tensors = [part.detach().float().sum() for part in parts if isinstance(part, Tensor)]
    return torch.stack(tensors).sum() if tensors else None
