"""Calibration images for what compresses without training: the same passes, again and again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from slope_mm.engine.calibration import copied_samples, evenly_spread_batches, undisturbed
from slope_mm.engine.data_files import check_data
from slope_mm.errors import ConfigError, DataError


def calibration_batches(config: Config, batches: int) -> list[Any]:
    """Batches of a config's training data, evenly spread and always the same.

    Args:
        config: A config with a train_dataloader.
        batches: How many, of the dataloader's own batch size.

    Raises:
        ConfigError: Without a train_dataloader.
        DataError: If the training data is not there, or cannot be indexed.
    """
    if config.get('train_dataloader') is None:
        raise ConfigError(
            'the config has no train_dataloader, whose images calibrate; give a config that trains'
        )
    check_data(config.get('train_dataloader'), 'train_dataloader')
    init_default_scope(config.get('default_scope') or 'mmdet')
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            _seed()
            loader = Runner.build_dataloader(config.train_dataloader, seed=0)
            if not hasattr(loader.dataset, '__getitem__') or not hasattr(loader.dataset, '__len__'):
                raise DataError(
                    'train_dataloader: its data set cannot be indexed, so no calibration images can'
                    ' be chosen; give a config with a map-style data set'
                )
            return list(evenly_spread_batches(loader, batches))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Scope in which a model trains, but for norms and dropout: they work as in inference."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_losses(model: nn.Module, batches: Sequence[Any] | Iterable[Any]) -> None:
    """Runs the loss forward of an mmengine model, which reaches every layer that is trained.

    Without gradients, with the norms' running statistics; samplers draw the same each time, and
    BN statistics, modes and random states are left as found.

    Args:
        model: A detector, dense or compressed.
        batches: Collated batches; they are not changed.
    """
    detector: Any = model
    with undisturbed(model), fixed_statistics(model):
        _seed()
        for batch in batches:
            data = detector.data_preprocessor(copied_samples(batch), True)
            detector._run_forward(data, mode='loss')
