"""What every choice costs a layer in accuracy, measured one layer at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from slope_mm.allocation.choices import with_weight
from slope_mm.analysis.output_error import OutputError, output_errors
from slope_mm.convert import compressed_layers, convert
from slope_mm.layers import CompressedLayer
from slope_mm.recipe import Recipe

#: ``output``: squared error of a layer's output over the output's square; ``sqnr``: the same of its
#: weight, which is ``10^(-SQNR/10)`` and needs no images.
MEASURES = ('output', 'sqnr')


@torch.no_grad()
def weight_error(layer: CompressedLayer) -> float:
    """``|w - ŵ|^2 / |w|^2``, of the standardized weight where the layer standardizes it."""
    latent = layer.latent_weight().double()
    noise = (latent - layer.compressed_weight().double()).square().sum()
    return OutputError(float(noise), float(latent.square().sum())).relative


def sensitivities(
    model: nn.Module,
    recipe: Recipe,
    choices: Sequence[tuple[str | None, int]],
    names: Collection[str],
    forward: Callable[[nn.Module], Any] | None = None,
) -> dict[str, dict[tuple[str | None, int], float]]:
    """The error of each layer under each choice, all others dense.

    Args:
        model: The dense model; it is left as it is. One compressed copy is held at a time.
        recipe: The recipe whose rules, code sets and steps hold.
        choices: Patterns and bits.
        names: The layers to judge.
        forward: Runs a model on the calibration images: the errors are those of the outputs (of
            the weights for a layer that the images never reach). None: those of the weights.

    Returns:
        By layer name, by choice; every error is relative to its layer's own signal.
    """
    found: dict[str, dict[tuple[str | None, int], float]] = {name: {} for name in names}
    for choice in choices:
        twin = convert(copy.deepcopy(model), with_weight(recipe, choice))
        layers = compressed_layers(twin)
        outputs = {}
        if forward is not None:
            outputs = output_errors(model, twin, lambda: forward(model), names)
        for name in names:
            by_output = outputs.get(name)
            error = weight_error(layers[name]) if by_output is None else by_output.relative
            # A layer that gives zeros (the last of a residual branch begins so) has no signal that
            # an error could be relative to: as much noise as signal, whatever the choice.
            found[name][choice] = error if math.isfinite(error) else 1.0
    return found
