"""Ways of training that cannot work on a compressed model, refused before anything is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from mmdet.engine.hooks import MeanTeacherHook
from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

from slope_mm.convert import compressed_layers
from slope_mm.engine.mixed_precision import has_accelerator
from slope_mm.errors import ConfigError

# Visualizer backends and what they import when the first value is written, after files were made.
BACKEND_PACKAGES = {
    'AimVisBackend': 'aim',
    'ClearMLVisBackend': 'clearml',
    'DVCLiveVisBackend': 'dvclive',
    'MLflowVisBackend': 'mlflow',
    'NeptuneVisBackend': 'neptune',
    'TensorboardVisBackend': 'tensorboard',
    'WandbVisBackend': 'wandb',
}
SHARDED = (
    'a SlopeModel cannot be trained under {kind}: it cuts the weights into flat pieces, and N:M'
    ' groups, steps of output channels and the regularizer need whole ones; use'
    ' MMDistributedDataParallel (leave model_wrapper_cfg and strategy out)'
)


def check_ways(config: Config, model: nn.Module) -> None:
    """Refuses what would stop, or go wrong in silence, once training has begun.

    Args:
        config: The whole config.
        model: The model that it describes.

    Raises:
        ConfigError: Says what cannot be and what to do instead.
    """
    check_backends(config.get('visualizer'))
    check_sync_bn(config)
    if not compressed_layers(model):
        return
    check_conv_bn_eval(config, model)
    check_sharding(config)
    check_teacher(config.get('custom_hooks') or (), model)


def check_backends(visualizer: Mapping[str, Any] | None) -> None:
    """Looks whether the packages of the visualizer's backends are installed.

    Raises:
        ConfigError: If one is not.
    """
    for backend in (visualizer or {}).get('vis_backends') or ():
        kind = type_name(backend)
        package = BACKEND_PACKAGES.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the visualizer's {kind} needs the package '{package}', which is not installed;"
                f' pip install {package}, or take the backend out of visualizer.vis_backends'
            )


def check_sync_bn(config: Config) -> None:
    """torch's and mmcv's synchronized batch norms exist for GPUs alone.

    Raises:
        ConfigError: If processes without a GPU are asked to synchronize.
    """
    if config.get('sync_bn') and config.get('launcher', 'none') != 'none' and not has_accelerator():
        raise ConfigError(
            f'sync_bn={config.sync_bn!r}: synchronized batch norms need GPUs, and there is none;'
            ' leave sync_bn out'
        )


def check_conv_bn_eval(config: Config, model: nn.Module) -> None:
    """mmengine's ``efficient_conv_bn_eval`` multiplies weights by BN before they are compressed.

    Raises:
        ConfigError: If it is switched on, for parts of the model or in a layer's own settings.
    """
    switched_on = config.get('efficient_conv_bn_eval') or any(
        getattr(module, 'efficient_conv_bn_eval_forward', None) is not None
        for module in model.modules()
    )
    if switched_on:
        raise ConfigError(
            'efficient_conv_bn_eval scales weights before they could be compressed, so it cannot'
            ' be used with a SlopeModel; remove it from the config'
        )


def check_sharding(config: Config) -> None:
    """Refuses wrappers and strategies that shard parameters.

    Raises:
        ConfigError: If one is named.
    """
    for key in ('model_wrapper_cfg', 'strategy'):
        kind = type_name(config.get(key) or {})
        if any(part in kind for part in ('FullySharded', 'FSDP', 'DeepSpeed', 'ColossalAI')):
            raise ConfigError(SHARDED.format(kind=kind))


def check_wrapped(model: nn.Module) -> None:
    """The same for a model that is wrapped already.

    Raises:
        ConfigError: If its parameters are sharded.
    """
    # By name: the import alone would cost every run a second.
    if any(kind.__name__ == 'FullyShardedDataParallel' for kind in type(model).__mro__):
        raise ConfigError(SHARDED.format(kind=type(model).__name__))


def check_optimizer(optimizer: Any) -> None:
    """Refuses optimizers that deal out parameters among ranks before steps have their group.

    Args:
        optimizer: ``optim_wrapper.optimizer``.

    Raises:
        ConfigError: If it is mmengine's ``ZeroRedundancyOptimizer``.
    """
    if type_name(optimizer) == 'ZeroRedundancyOptimizer':
        raise ConfigError(
            'optim_wrapper.optimizer: ZeroRedundancyOptimizer deals out parameters among the ranks'
            ' when it is built, and the steps of a SlopeModel get their group after that; name its'
            ' optimizer_type as the type in its place'
        )


def check_teacher(hooks: Any, model: nn.Module) -> None:
    """mmdet's ``MeanTeacherHook`` pairs the parameters of student and teacher by their order.

    Raises:
        ConfigError: If it would pair the wrong ones.
    """
    student, teacher = getattr(model, 'student', None), getattr(model, 'teacher', None)
    if not isinstance(student, nn.Module) or not isinstance(teacher, nn.Module):
        return
    names = [[name for name, _ in part.named_parameters()] for part in (student, teacher)]
    for hook in hooks:
        kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
        if isinstance(kind, str):
            with HOOKS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        if kind is MeanTeacherHook and names[0] != names[1]:
            raise ConfigError(
                'custom_hooks: MeanTeacherHook pairs parameters by their order, but the compressed'
                ' student has steps that the dense teacher has not; use'
                " type='slope_mm.SlopeMeanTeacherHook'"
            )


def type_name(settings: Any) -> str:
    """The name that settings, or an object, have for their type, without its scope."""
    kind = settings.get('type', '') if isinstance(settings, Mapping) else type(settings)
    kind = kind if isinstance(kind, str) else kind.__name__
    return kind.rsplit('.', 1)[-1]
