"""The constructor that gives any optim wrapper a regularizer, and steps a group of their own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.engine.mixed_precision import MixedPrecisionOptimWrapper
from slope_mm.engine.optim_wrapper import (
    MISSING,
    STEP_LIMIT,
    RegularizedOptimWrapper,
    SlopeAmpOptimWrapper,
    SlopeOptimWrapper,
    check_compile,
    check_step_limit,
)
from slope_mm.engine.refusals import check_optimizer, check_wrapped
from slope_mm.engine.regularization import Regularizer
from slope_mm.errors import ConfigError
from slope_mm.ops import fused

OWN_KEYS = (
    'constructor',
    'regularizer',
    'base_constructor',
    'step_lr_mult',
    'step_limit',
    'compile',
)

_REGULARIZED: dict[type[OptimWrapper], type[RegularizedOptimWrapper]] = {
    OptimWrapper: SlopeOptimWrapper,
    AmpOptimWrapper: SlopeAmpOptimWrapper,
    MixedPrecisionOptimWrapper: SlopeAmpOptimWrapper,
}


def _regularized(kind: type[OptimWrapper]) -> type[RegularizedOptimWrapper]:
    """The class that adds a regularizer to a given wrapper class."""
    if issubclass(kind, RegularizedOptimWrapper):
        return kind
    if kind not in _REGULARIZED:
        _REGULARIZED[kind] = type(f'Slope{kind.__name__}', (RegularizedOptimWrapper, kind), {})
    return _REGULARIZED[kind]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SlopeOptimWrapperConstructor:
    """Builds any optim wrapper, gives it the regularizer and the steps a group of their own.

    Keys that it takes from ``optim_wrapper`` beside the stock ones:

        regularizer: dict with ``type`` (``'cosine'``, ``'l2'``, ``'none'``), ``weight`` (lambda)
            and ``granularity`` (``'layer'``, ``'filter'``).
        base_constructor: The constructor that builds the optimizer; layer-decay ones for instance.
            Defaults to ``'DefaultOptimWrapperConstructor'``.
        step_lr_mult: Learning rate of the steps relative to that which ``paramwise_cfg`` and the
            base constructor give them: the optimizer's, or that of their layer
            (``custom_keys=dict(backbone=dict(lr_mult=0.1))``). Defaults to 1.
        step_limit: Largest relative change of a step in one update. Defaults to 0.005.
        compile: Compress through fused kernels (docs/performance.md). On CUDA they are Triton's,
            and used unless this is False. On a CPU torch compiles them ahead of time, once on a
            machine, for about a minute; they are used if this is True, and hold no compressed
            weight between a layer's forward and backward. Defaults to None, as each device has it.

    Steps get no weight decay: it would pull every level towards zero.
    """

    def __init__(
        self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None
    ) -> None:
        cfg = dict(optim_wrapper_cfg)
        if 'regularizer' not in cfg:
            raise ConfigError(MISSING)
        given = cfg.pop('regularizer')
        check_optimizer(cfg.get('optimizer') or {})
        self.regularizer = Regularizer.parse(given)
        self.step_limit = check_step_limit(cfg.pop('step_limit', STEP_LIMIT))
        kind = cfg.get('type', 'OptimWrapper')
        if isinstance(kind, str):
            kind = OPTIM_WRAPPERS.get(kind)
        if isinstance(kind, type) and issubclass(kind, RegularizedOptimWrapper):
            # Named beside the constructor: it asks for a regularizer itself.
            cfg['regularizer'] = given
        elif kind is AmpOptimWrapper:
            # mmengine's own, which its --amp flag writes, cannot be built without an accelerator.
            cfg.update(type=SlopeAmpOptimWrapper, regularizer=given)
        fused.use_fused(check_compile(cfg.pop('compile', None)))
        self.step_lr_mult = cfg.pop('step_lr_mult', 1.0)
        if not isinstance(self.step_lr_mult, (int, float)) or not self.step_lr_mult >= 0:
            raise ConfigError(
                f'optim_wrapper.step_lr_mult={self.step_lr_mult!r} is no number >= 0; give 0 for'
                ' fixed steps or a positive factor'
            )
        base = cfg.pop('base_constructor', 'DefaultOptimWrapperConstructor')
        for key in cfg:
            # What is left is the wrapper's own; one's own wrapper may take anything.
            meant = difflib.get_close_matches(key, OWN_KEYS, n=1, cutoff=0.8)
            if meant and meant != [key]:
                raise ConfigError(
                    f'optim_wrapper has the key {key!r}, which neither SLOPE nor mmengine knows;'
                    f' did you mean {meant[0]!r}?'
                )
        self.base = dict(
            type=base,
            optim_wrapper_cfg=cfg,
            paramwise_cfg=paramwise_cfg,
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the wrapper for a (possibly DDP-wrapped) model.

        Raises:
            ConfigError: If the constructor builds several wrappers, or the model is sharded.
        """
        check_wrapped(model)
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(self.base)(model)
        if not isinstance(wrapper, OptimWrapper):
            raise ConfigError(
                f'{self.base["type"]} built a {type(wrapper).__name__}, which has no single loss'
                ' to regularize; use a constructor that builds one OptimWrapper'
            )
        wrapper.__class__ = _regularized(type(wrapper))
        wrapper.set_regularizer(self.regularizer)
        wrapper.step_limit = self.step_limit
        self._group_steps(wrapper.optimizer, getattr(model, 'module', model))
        return wrapper

    def _group_steps(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        named = {
            step: f'{name}.{key}' if name else key
            for name, layer in compressed_layers(model).items()
            for key, step in layer.steps.items()
        }
        if not named:
            return
        # A base constructor may leave frozen parameters out; their steps stay out too.
        rates = {p: float(group['lr']) for group in optimizer.param_groups for p in group['params']}
        groups = []
        for group in optimizer.param_groups:
            others = [i for i, p in enumerate(group['params']) if p not in named]
            # Layer-decay constructors name their parameters beside listing them.
            for key in {'params', 'param_names'} & group.keys():
                group[key] = [group[key][i] for i in others]
            if others:
                groups.append(group)
        optimizer.param_groups[:] = groups
        # torch takes names in all groups or in none.
        has_names = any('param_names' in group for group in groups)
        for rate in dict.fromkeys(rates[p] for p in named if p in rates):
            steps = [p for p in named if rates.get(p) == rate]
            own: dict[str, Any] = {'params': steps, 'lr': rate * self.step_lr_mult}
            if has_names:
                own['param_names'] = [named[p] for p in steps]
            optimizer.add_param_group({**own, 'weight_decay': 0.0})
