"""L_reg of a model: what the optim wrapper adds to the loss, and the same as a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import ConfigError, nearest
from slope_mm.layers import CompressedLayer
from slope_mm.ops import check_regularizer, power_sums, regularize

KEYS = ('type', 'weight', 'granularity', 'gradient')
# 'exact': the compressed weight is piecewise constant in W, so only W itself is differentiated.
# 'ste': the straight-through estimator here as well (for comparison; it lets the cosine fall).
GRADIENTS = ('exact', 'ste')


def mean_over_layers(
    layers: Iterable[CompressedLayer],
    type: str,
    granularity: str,
    gradient: str = 'exact',
    *,
    only: Callable[[CompressedLayer], bool] | None = None,
) -> Tensor | None:
    """(1/n) of the sum over the items of all trainable layers.

    Args:
        layers: Compressed layers.
        type: Name in ``slope_mm.ops.regularizers.REGULARIZERS``.
        granularity: ``'layer'`` or ``'filter'``.
        gradient: ``'exact'`` or ``'ste'``.
        only: Whose terms are added up; None for all. The others still count in n, so that the
            scale is the same on every rank.

    Returns:
        fp32 scalar, or None if there is no term.
    """
    check_regularizer(type, granularity)
    if gradient not in GRADIENTS:
        raise ConfigError(
            f'regularizer gradient={gradient!r} is unknown; choose one of {list(GRADIENTS)}'
            f'{nearest(str(gradient), GRADIENTS)}'
        )
    terms, items = [], 0
    for layer in layers:
        if not layer.weight.requires_grad or not layer.changes_weight:
            continue
        items += 1 if granularity == 'layer' else layer.weight.shape[layer.output_axis]
        if only is None or only(layer):
            terms.append(layer)
    if not terms:
        return None
    with torch.autocast(terms[0].weight.device.type, enabled=False):
        if gradient == 'exact':
            sums = [layer.weight_powers() for layer in terms]
        else:
            sums = [
                power_sums(layer.latent_weight(), layer.compressed_weight(), layer.output_axis)
                for layer in terms
            ]
        return regularize(type, sums, granularity).sum() / items


def leaves_of(loss: Tensor) -> set[int]:
    """``id`` of every parameter in a loss's graph."""
    seen: set[Any] = set()
    leaves, rest = set(), [loss.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            leaves.add(id(node.variable))
        rest.extend(before for before, _ in node.next_functions)
    return leaves


def regularization(
    model: nn.Module, type: str = 'cosine', granularity: str = 'layer', gradient: str = 'exact'
) -> Tensor:
    """L_reg of a model (arXiv 2511.08360, eq. 5), for training loops of one's own.

    Args:
        model: A compressed model.
        type: ``'cosine'``, ``'l2'`` or ``'none'``.
        granularity: ``'layer'``: one term a layer; ``'filter'``: one term an output filter.
        gradient: ``'exact'`` differentiates W and the steps where they are differentiable;
            ``'ste'`` also sends the compressed weight's gradient straight through to W, as a plain
            autograd implementation would.

    Returns:
        fp32 scalar, differentiable in the latent weights and the steps; layers with frozen
        parameters add nothing.

    Raises:
        RecipeError: If the type or the granularity is unknown.
    """
    value = mean_over_layers(compressed_layers(model).values(), type, granularity, gradient)
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
        gradient: ``'exact'`` or ``'ste'``.
        scale: Factor on lambda at present (warm-up), set by the schedule hook.
    """

    type: str = 'cosine'
    weight: float = 1.0
    granularity: str = 'layer'
    gradient: str = 'exact'
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
        # Of no layers: checks the names.
        mean_over_layers((), made.type, made.granularity, made.gradient)
        if not isinstance(made.weight, (int, float)) or not 0 <= made.weight < float('inf'):
            raise ConfigError(
                f'optim_wrapper.regularizer.weight={made.weight!r} is not a number >= 0'
            )
        if made.type == 'none' and made.weight not in (0, cls.weight):
            # It may be inherited; who sets it by hand wants to know.
            warnings.warn(
                f"optim_wrapper.regularizer.weight={made.weight!r} has no effect with type='none':"
                " nothing is regularized; type='cosine' (or 'l2') would do it",
                stacklevel=2,
            )
        return made

    @property
    def active(self) -> bool:
        """Whether it adds anything at present."""
        return self.type != 'none' and self.weight * self.scale > 0

    def __call__(
        self, layers: Iterable[CompressedLayer], loss: Tensor | None = None
    ) -> Tensor | None:
        """``scale * weight * L_reg`` over the layers that ran in this step, or None if nothing.

        Under DDP with unused parameters the others must not get a gradient.

        Args:
            layers: Compressed layers.
            loss: Leave out layers that this loss does not depend on as well, though they ran.
        """
        if not self.active:
            return None
        leaves = None if loss is None else leaves_of(loss)

        def takes_part(layer: CompressedLayer) -> bool:
            return bool(layer.runs) and (leaves is None or id(layer.weight) in leaves)

        value = mean_over_layers(
            layers, self.type, self.granularity, self.gradient, only=takes_part
        )
        return None if value is None else value * (self.weight * self.scale)
