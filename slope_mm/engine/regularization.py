"""L_reg of a model: what the optim wrapper adds to the loss, and the same as a function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import ConfigError, nearest
from slope_mm.layers import CompressedLayer
from slope_mm.ops import get_regularizer

KEYS = ('type', 'weight', 'granularity')


def mean_over_layers(
    layers: Iterable[CompressedLayer],
    type: str,
    granularity: str,
    *,
    only_if_run: bool = False,
) -> Tensor | None:
    """(1/n) of the sum over the items of all trainable layers.

    Args:
        layers: Compressed layers.
        type: Name in ``slope_mm.ops.REGULARIZERS``.
        granularity: ``'layer'`` or ``'filter'``.
        only_if_run: Leave out the terms of layers without a forward in this step (under DDP with
            unused parameters they must not get a gradient). They still count in n, so that the
            scale is the same on every rank.

    Returns:
        fp32 scalar, or None if there is no term.
    """
    regularizer = get_regularizer(type, granularity)
    terms, items = [], 0
    for layer in layers:
        if not layer.weight.requires_grad or not layer.changes_weight:
            continue
        items += 1 if granularity == 'layer' else layer.weight.shape[layer.output_axis]
        if only_if_run and not layer.runs:
            continue
        with torch.autocast(layer.weight.device.type, enabled=False):
            values = regularizer(
                layer.weight, layer.compressed_weight(), granularity, layer.output_axis
            )
            terms.append(values.sum())
    if not terms:
        return None
    return torch.stack(terms).sum() / items


def regularization(model: nn.Module, type: str = 'cosine', granularity: str = 'layer') -> Tensor:
    """L_reg of a model (arXiv 2511.08360, eq. 5), for training loops of one's own.

    Args:
        model: A compressed model.
        type: ``'cosine'``, ``'l2'`` or ``'none'``.
        granularity: ``'layer'``: one term a layer; ``'filter'``: one term an output filter.

    Returns:
        fp32 scalar, differentiable in the latent weights and (through the straight-through
        estimator) the steps; layers with frozen parameters add nothing.

    Raises:
        RecipeError: If the type or the granularity is unknown.
    """
    value = mean_over_layers(compressed_layers(model).values(), type, granularity)
    if value is None:
        device = next((p.device for p in model.parameters()), torch.device('cpu'))
        return torch.zeros((), device=device)
    return value


@dataclass
class Regularizer:
    """``weight * L_reg`` with what a config says about it.

    Attributes:
        type: Name of the regularizer.
        weight: Lambda.
        granularity: ``'layer'`` or ``'filter'``.
        scale: Factor on lambda at present (warm-up), set by the schedule hook.
    """

    type: str = 'cosine'
    weight: float = 1.0
    granularity: str = 'layer'
    scale: float = 1.0

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Regularizer:
        """Validates ``optim_wrapper.regularizer``; None means ``type='none'``.

        Raises:
            ConfigError: For unknown keys or a negative weight.
            RecipeError: For an unknown type or granularity.
        """
        if given is None:
            return cls('none', 0.0)
        if not isinstance(given, Mapping):
            raise ConfigError(
                f'optim_wrapper.regularizer is {given!r}; write'
                " regularizer=dict(type='cosine', weight=…)"
            )
        plain = {key: value for key, value in given.items() if key != '_scope_'}
        for key in plain:
            if key not in KEYS:
                raise ConfigError(
                    f'optim_wrapper.regularizer has the unknown key {key!r}'
                    f'{nearest(str(key), KEYS)}; allowed: {", ".join(KEYS)}'
                )
        made = cls(**plain)
        get_regularizer(made.type, made.granularity)
        if not isinstance(made.weight, (int, float)) or not 0 <= made.weight < float('inf'):
            raise ConfigError(
                f'optim_wrapper.regularizer.weight={made.weight!r} is not a number >= 0'
            )
        return made

    def __call__(self, layers: Iterable[CompressedLayer]) -> Tensor | None:
        """``scale * weight * L_reg`` over the layers that ran in this step, or None if nothing."""
        factor = self.weight * self.scale
        if self.type == 'none' or factor == 0:
            return None
        value = mean_over_layers(layers, self.type, self.granularity, only_if_run=True)
        return None if value is None else value * factor
