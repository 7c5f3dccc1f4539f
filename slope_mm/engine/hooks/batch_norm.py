"""What becomes of batch norm statistics while weights are compressed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.dist import all_reduce_dict, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slope_mm.engine.averaging import averages
from slope_mm.engine.calibration import evenly_spread_batches, undisturbed
from slope_mm.errors import ConfigError, nearest

POLICIES = ('frozen', 'adapting', 're-estimated')


@HOOKS.register_module()
class SlopeBatchNormHook(Hook):
    """Freezes batch norm statistics, lets them adapt, or estimates them anew at the end.

    Statistics of a dense start belong to its activations, not to those of the compressed weights.
    The model's own ``norm_eval`` decides without this hook, and often for the backbone alone.

    Note:
        Re-estimation comes before the last checkpoint is written and before the last evaluation:
        the plain mean, over some batches of training data, of each batch's mean and variance
        ("precise BN", arXiv 2105.07576), with the compressed weights as they are then; pooled over
        ranks. Weights, random states and modes stay as found. Layers adapt until then. Averaged
        models (EMAHook's and its kin's) get statistics of their own; where the average takes its
        buffers from the model in training, that one gets the averaged model's, since evaluations
        and checkpoints have both with averaged weights.

    Args:
        policy (str): ``'frozen'``, ``'adapting'`` or ``'re-estimated'``.
        batches (int): Batches per rank for ``'re-estimated'``. Defaults to 16.
    """

    # After averaged models took the iteration's buffers, before checkpoints are written.
    priority = 'LOW'

    def __init__(self, policy: str, batches: int = 16) -> None:
        if policy not in POLICIES:
            raise ConfigError(
                f'SlopeBatchNormHook policy={policy!r} is unknown; choose one of {list(POLICIES)}'
                f'{nearest(str(policy), POLICIES)}'
            )
        if not isinstance(batches, int) or batches < 1:
            raise ConfigError(
                f'SlopeBatchNormHook batches={batches!r} is not a number of batches >= 1'
            )
        self.policy, self.batches = policy, batches
        self._norms: list[_BatchNorm] = []

    def before_train(self, runner: Any) -> None:
        """Learns the norms.

        Raises:
            ConfigError: If training may stop early, and so before statistics are re-estimated.
        """
        if self.policy == 're-estimated' and any(
            isinstance(hook, EarlyStoppingHook) for hook in runner.hooks
        ):
            raise ConfigError(
                "SlopeBatchNormHook policy='re-estimated' works in the last epoch, which a training"
                " with EarlyStoppingHook may not reach; leave one of them out, or take 'adapting'"
            )
        self._norms = norms_of(runner.model)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the norms' mode: loops and models put it back whenever an epoch begins."""
        self.set_modes(self._norms)

    def set_modes(self, norms: Iterable[_BatchNorm]) -> None:
        """Puts norms into the mode that they train in under the policy."""
        for norm in norms:
            norm.train(self.policy != 'frozen')

    def after_train_epoch(self, runner: Any) -> None:
        """Re-estimates after the last epoch."""
        if by_epoch(runner) and runner.epoch + 1 >= runner.max_epochs:
            self._re_estimate(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Re-estimates after the last iteration of a loop that has no epochs."""
        if not by_epoch(runner) and runner.iter + 1 >= runner.max_iters:
            self._re_estimate(runner)

    def _re_estimate(self, runner: Any) -> None:
        if self.policy != 're-estimated':
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        count = self._over_batches(runner, model)
        for average in averages(runner):
            self._over_batches(runner, average.module)
            if not average.update_buffers:
                pairs = zip(norms_of(model), norms_of(average.module), strict=True)
                for own, averaged in pairs:
                    for kept, found in zip(_statistics(own), _statistics(averaged), strict=True):
                        kept.copy_(found)
        runner.logger.info(
            f'SLOPE: the statistics of {count} batch norms are those of {self.batches} batches a'
            ' rank'
        )

    def _over_batches(self, runner: Any, model: nn.Module) -> int:
        batches = evenly_spread_batches(
            runner.train_dataloader, self.batches, get_rank(), get_world_size()
        )
        return re_estimate(model, batches)


def by_epoch(runner: Any) -> bool:
    """Whether training goes by epochs."""
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def re_estimate(model: nn.Module, batches: Iterator[Any]) -> int:
    """Replaces batch norm statistics by their mean over batches.

    Args:
        model: An mmengine model (not wrapped).
        batches: Collated batches, as its dataloader gives them.

    Returns:
        The number of batch norms.
    """
    norms = norms_of(model)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    found: dict[str, Tensor] = {}
    detector: Any = model
    try:
        model.train()
        with undisturbed(model):
            for norm in norms:
                norm.reset_running_stats()
                # None: the plain mean over all batches.
                norm.momentum = None
                norm.train()
            for batch in batches:
                data = detector.data_preprocessor(batch, True)
                detector._run_forward(data, mode='loss')
            for index, norm in enumerate(norms):
                mean, var, seen = _statistics(norm)
                # Sums over batches, so that ranks can be pooled.
                found[f'{index} mean'], found[f'{index} var'] = mean * seen, var * seen
                found[f'{index} seen'] = seen.reshape(1).to(mean)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if get_world_size() > 1:
        all_reduce_dict(found)
    for index, norm in enumerate(norms):
        seen = found[f'{index} seen']
        # A norm that saw nothing (no foreground) keeps what it had.
        if float(seen):
            mean, var, _ = _statistics(norm)
            mean.copy_(found[f'{index} mean'] / seen)
            var.copy_(found[f'{index} var'] / seen)
    return len(norms)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance, and the number of batches in them."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and var is not None and count is not None
    return mean, var, count
