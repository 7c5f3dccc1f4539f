"""Optim wrappers that add the regularizer to the loss."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.engine.calibration import FirstBatchCalibration
from slope_mm.engine.mixed_precision import MixedPrecisionOptimWrapper
from slope_mm.engine.refusals import check_wrapped
from slope_mm.engine.regularization import Regularizer
from slope_mm.errors import ConfigError
from slope_mm.layers import STOCK_KINDS, CompressedLayer
from slope_mm.layers.sharing import compress_together
from slope_mm.ops import fused
from slope_mm.ops.tracing import left_out

# Per update. Weights move by about a percent in an update of AdamW at 5e-4; steps may not outrun
# them.
STEP_LIMIT = 0.005


MISSING = (
    "optim_wrapper has no regularizer; write regularizer=dict(type='cosine', weight=…), or"
    " dict(type='none') for the naive arm"
)


def check_step_limit(limit: float) -> float:
    """Returns the limit if it is a share between 0 and 1.

    Raises:
        ConfigError: Otherwise.
    """
    if not isinstance(limit, (int, float)) or not 0 < limit < 1:
        raise ConfigError(f'optim_wrapper.step_limit={limit!r} is not a share between 0 and 1')
    return float(limit)


def check_compile(compile: object) -> bool | None:
    """Returns what ``optim_wrapper.compile`` says if it is True, False or None.

    Raises:
        ConfigError: Otherwise.
    """
    if compile is None or isinstance(compile, bool):
        return compile
    raise ConfigError(
        f'optim_wrapper.compile={compile!r} is neither True nor False; write True for fused'
        ' kernels, False for none, or leave it out: they are on where that pays at once, on CUDA'
    )


_NO_RATIO = (
    'SlopeMonitorHook(gradients=True) compares gradients that reentrant activation checkpointing'
    ' (with_cp, activation_checkpointing) does not hand out; leave one of the two out'
)


class Guard(Protocol):
    """Says whether a loss and gradients may be used; may raise instead."""

    def admits_loss(self, loss: Tensor) -> bool: ...

    def admits_gradients(self) -> bool: ...

    def updated(self) -> None: ...


def _norm(tensors: Sequence[Tensor | None]) -> Tensor:
    norms = [torch.linalg.vector_norm(x.float()) for x in tensors if x is not None]
    return torch.linalg.vector_norm(torch.stack(norms))


class RegularizedOptimWrapper(OptimWrapper):
    """Mixin of an optim wrapper that adds ``weight * L_reg`` to each loss.

    Within one ``optim_context`` … ``update_params`` every layer's compressed weight is computed
    once, for all its forward calls and the regularizer.

    Attributes:
        regularizer: What is added.
        step_limit: Largest relative change of a quantization step in one update.
        last_regularization: ``weight * L_reg`` of the latest step, detached; None before it.
        guard: Who is asked whether a loss and its gradients may be used (SlopeFiniteHook).
        watch_gradients: Whether the next step measures ``gradient_ratio``, at the price of two
            backward passes.
        gradient_ratio: Norm of the regularizer's gradient over all latent weights, relative to that
            of the task's loss, when it was last measured; None before.
    """

    regularizer: Regularizer
    step_limit: float = STEP_LIMIT
    last_regularization: Tensor | None = None
    guard: Guard | None = None
    _dropped: bool = False
    _some_unused: bool = False
    watch_gradients: bool = False
    gradient_ratio: Tensor | None = None

    def __init__(
        self,
        *args: Any,
        regularizer: Mapping[str, Any] | None = None,
        step_limit: float = STEP_LIMIT,
        compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if compile is not None:
            fused.use_fused(check_compile(compile))
        if regularizer is None:
            raise ConfigError(MISSING)
        self.set_regularizer(Regularizer.parse(regularizer))
        self.step_limit = check_step_limit(step_limit)

    def set_regularizer(self, regularizer: Regularizer) -> None:
        """Sets what is added to the loss; forgets the model that was seen last."""
        self.regularizer = regularizer
        self._model: nn.Module | None = None
        self._layers: list[CompressedLayer] = []
        self.last_regularization = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Learns the layers from the model and opens the step's sharing scope."""
        if 'torch._dynamo' in sys.modules:
            _leave_uncompiled()
        self._begin_step(model)
        try:
            with super().optim_context(model):
                yield
        except BaseException:
            self._end_step()
            raise

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict | None = None,
        zero_kwargs: dict | None = None,
    ) -> None:
        """Adds the regularizer, then does what the stock wrapper does.

        Before ``super().update_params``, so that gradient accumulation scales it with the loss.
        """
        try:
            # DDP has marked what its loss does not reach; such a layer may have run all the same.
            regularization = self.regularizer(self._layers, loss if self._some_unused else None)
        finally:
            # Before the backward pass: activation checkpointing runs layers once more inside it,
            # and needs a graph of its own there.
            self._end_step()
        if regularization is not None:
            self.last_regularization = regularization.detach()
            if self.watch_gradients:
                self.gradient_ratio = self._ratio(regularization, loss)
            loss = loss + regularization
        self.watch_gradients = False
        if self.guard is not None and not self.guard.admits_loss(loss):
            self._drop_update(zero_kwargs)
            return
        super().update_params(loss, step_kwargs, zero_kwargs)

    def _drop_update(self, zero_kwargs: dict | None) -> None:
        """Passes over a loss, and with it over the update that it would have been part of.

        Of an accumulated update nothing is left over: DDP exchanges gradients in the backward pass
        of its last loss, which may be the one that is missing.
        """
        self._dropped = True
        self._inner_count += 1
        if self.should_update():
            self._dropped = False
            self.zero_grad(**(zero_kwargs or {}))

    def _refused(self) -> bool:
        """Whether the gradients at hand may not be used."""
        dropped, self._dropped = self._dropped, False
        if dropped or self.guard is None:
            return dropped
        scaler = getattr(self, 'loss_scaler', None)
        if scaler is not None and scaler.is_enabled():
            # Infinite gradients are how it finds its scale; it skips such updates by itself.
            return False
        return not self.guard.admits_gradients()

    def _ratio(self, regularization: Tensor, loss: Tensor) -> Tensor:
        """Ratio of both gradients' norms over what the regularizer pulls at, on this rank.

        Steps are left out, and no gradient is kept.
        """
        assert self._model is not None
        steps = set(self._steps())
        weights = [p for p in self._model.parameters() if p.requires_grad and p not in steps]
        pulls = torch.autograd.grad(regularization, weights, retain_graph=True, allow_unused=True)
        pulled = [w for w, pull in zip(weights, pulls, strict=True) if pull is not None]
        try:
            tasks = torch.autograd.grad(loss, pulled, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            # Torch's reentrant checkpoint refuses to be asked for some gradients alone.
            if 'checkpoint' not in str(error).lower():
                raise
            raise ConfigError(_NO_RATIO) from None
        ran = {id(layer.weight) for layer in self._layers if layer.runs}
        if any(id(w) in ran for w, task in zip(pulled, tasks, strict=True) if task is None):
            # It has no graph of what is inside.
            raise ConfigError(_NO_RATIO)
        return _norm(pulls) / _norm(tasks)

    def _begin_step(self, model: nn.Module) -> None:
        module: nn.Module = getattr(model, 'module', model)
        self._some_unused = bool(getattr(model, 'find_unused_parameters', False))
        if module is not self._model:
            check_wrapped(model)
            self._model = module
            self._layers = list(compressed_layers(module).values())
            self._warn_of_decay()
        factor = self._loss_factor()
        sums = self.regularizer.gradient == 'exact' and self.regularizer.active
        again = self.regularizer.gradient == 'ste' and self.regularizer.active
        # A layer that ran once will do so again. Heads that levels share run several times, and so
        # do layers under activation checkpointing, whose second run needs a graph of its own.
        once = [layer for layer in self._layers if layer.runs == 1]
        for layer in self._layers:
            let_go = layer.runs == 1 and not again and fused.saves_memory(layer.weight)
            layer.begin_sharing(sums, let_go=let_go)
            layer.__dict__.update(runs=0, loss_factor=factor)
        if once and fused.triton_enabled(once[0].weight):
            compress_together(once)
        module.slope_in_step = True  # type: ignore[assignment]

    def _warn_of_decay(self) -> None:
        steps = {id(step) for step in self._steps()}
        decayed = sum(
            id(p) in steps
            for group in self.optimizer.param_groups
            if group.get('weight_decay')
            for p in group['params']
        )
        if decayed:
            print_log(
                f'SLOPE: {decayed} quantization steps have weight decay, which pulls every level'
                ' towards zero; name the constructor that gives them a group without,'
                " optim_wrapper.constructor='slope_mm.SlopeOptimWrapperConstructor'",
                logger='current',
                level=logging.WARNING,
            )

    def _end_step(self) -> None:
        for layer in self._layers:
            layer.end_sharing()
        if self._model is not None:
            self._model.slope_in_step = False  # type: ignore[assignment]

    def step(self, **kwargs: Any) -> None:
        """Updates the parameters; no step changes by more than ``step_limit`` of itself.

        But for those of weights that were all zero (:meth:`CompressedLayer.leave_zero`).

        Optimizers of Adam's kind move every parameter by about the learning rate, which is a fair
        share of a weight but may be many times an 8-bit step. The limit also keeps steps positive.
        """
        if self._refused():
            return
        if self.guard is not None:
            self.guard.updated()
        steps = self._steps()
        if not steps:
            super().step(**kwargs)
            return
        with torch.no_grad():
            # What quantizes is a step's magnitude; a negative one's bounds would change places.
            torch._foreach_abs_(steps)
            least = torch._foreach_mul(steps, 1 - self.step_limit)
            most = torch._foreach_mul(steps, 1 + self.step_limit)
        super().step(**kwargs)
        with torch.no_grad():
            torch._foreach_maximum_(steps, least)
            torch._foreach_minimum_(steps, most)
        for layer in self._layers:
            layer.leave_zero()

    def _loss_factor(self) -> float:
        # The last update of a training may be accumulated over fewer iterations.
        factor = float(self.scale_loss(torch.ones(())))
        decays = any(layer.slope_spec.gradient == 'sr_ste' for layer in self._layers)
        scaler = getattr(self, 'loss_scaler', None)
        # Asking the scaler stalls a GPU; only SR-STE needs to know.
        return factor * scaler.get_scale() if decays and scaler is not None else factor

    def _steps(self) -> list[Tensor]:
        return [step for layer in self._layers for step in layer.steps.values()]


@functools.cache
def _leave_uncompiled() -> None:
    """Has torch.compile of a train step leave out what is SLOPE's.

    Layers look at values (is W finite, is the input calibrated), share one compressed weight a step
    and have gradients of their own, all of which breaks or falls apart when it is traced. Done when
    a step begins and the compiler is there, as the decorator would import the whole of it.
    """
    for owner in STOCK_KINDS:
        owner.forward = left_out(owner.forward)
    FirstBatchCalibration.__call__ = left_out(FirstBatchCalibration.__call__)  # type: ignore[method-assign]
    for name in ('_begin_step', 'update_params'):
        whole = left_out(getattr(RegularizedOptimWrapper, name))
        setattr(RegularizedOptimWrapper, name, whole)


@OPTIM_WRAPPERS.register_module()
class SlopeOptimWrapper(RegularizedOptimWrapper):
    """``OptimWrapper`` with a ``regularizer=dict(type=…, weight=…, granularity=…)``."""


@OPTIM_WRAPPERS.register_module()
class SlopeAmpOptimWrapper(RegularizedOptimWrapper, MixedPrecisionOptimWrapper):
    """``AmpOptimWrapper`` with a ``regularizer``; the regularizer itself is computed in fp32.

    Without an accelerator it trains in bf16 (:class:`MixedPrecisionOptimWrapper`).
    """
