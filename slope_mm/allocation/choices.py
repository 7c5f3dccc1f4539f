"""What the layers of a model may get, and what each possibility takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from slope_mm.analysis.bops import spec_bops
from slope_mm.analysis.size import own_tensors, stored_bits
from slope_mm.convert import plan
from slope_mm.errors import RecipeError
from slope_mm.layers import LayerSpec, Projection, find_weights
from slope_mm.ops import check_bits, parse_pattern
from slope_mm.recipe import Recipe

#: Sparsity patterns (None: dense) and bits that are combined unless others are asked for.
PATTERNS: tuple[str | None, ...] = (None, '2:4', '2:8', '2:16')
BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Candidate:
    """One possibility for one layer.

    Attributes:
        spec: What the layer would get.
        bits: What it would store, from the size calculator.
        bops: Its bit operations on the image that was counted; 0 where none was.
    """

    spec: LayerSpec
    bits: int
    bops: float = 0.0


def weight_choices(
    patterns: Sequence[str | None] = PATTERNS, bits: Sequence[int] = BITS
) -> list[tuple[str | None, int]]:
    """All pairs of a pattern and bits, validated.

    Raises:
        RecipeError: If a pattern or a bit width is impossible, or nothing is left to choose from.
    """
    for pattern in patterns:
        if pattern is not None:
            parse_pattern(pattern)
    for width in bits:
        check_bits(width, 'weight')
    pairs = list(dict.fromkeys((pattern, width) for pattern in patterns for width in bits))
    if len(pairs) < 2:
        raise RecipeError('there is nothing to choose from; give two patterns, or two bit widths')
    return pairs


def fitting(
    model: nn.Module, recipe: Recipe, patterns: Sequence[str | None] = PATTERNS
) -> list[str | None]:
    """The patterns that at least one of a model's free layers can hold, and None."""
    found: list[str | None] = []
    for pattern in patterns:
        try:
            plan(model, with_weight(recipe, (pattern, BITS[0])))
        except RecipeError:
            if pattern is None:
                raise
        else:
            found.append(pattern)
    return found


def with_weight(recipe: Recipe, choice: tuple[str | None, int]) -> Recipe:
    """The recipe with another pattern and other bits as its own; its rules keep the last word."""
    pattern, bits = choice
    sparsity = None if pattern is None else parse_pattern(pattern)
    return replace(recipe, weight=replace(recipe.weight, sparsity=sparsity, bits=bits))


def same(one: LayerSpec | None, other: LayerSpec | None) -> bool:
    """Whether two specs compress alike; how they came about does not count."""
    if one is None or other is None:
        return one is other
    return replace(one, note='') == replace(other, note='')


def candidates(
    model: nn.Module,
    recipe: Recipe,
    choices: Sequence[tuple[str | None, int]],
    macs: Mapping[str, int] | None = None,
) -> dict[str, dict[tuple[str | None, int], Candidate]]:
    """What each free layer may get.

    Free is a layer that follows the recipe's own weight part: where a rule (the user's, or a
    default one for stems and prediction layers) decides pattern and bits, it stays decided. Where
    a layer cannot hold a pattern, that choice is the dense one of the same bits.

    Args:
        model: The dense model.
        recipe: The recipe whose rules hold.
        choices: From :func:`weight_choices`.
        macs: Multiply-accumulates by layer, where bit operations count.

    Returns:
        By layer name, by choice.

    Raises:
        RecipeError: If a pattern fits no layer, no layer is free, or one is compressed under some
            choices alone.
    """
    weights = {weight.name: weight for weight in find_weights(model)}
    found: dict[str, dict[tuple[str | None, int], Candidate]] = {}
    for choice in choices:
        try:
            planned = plan(model, with_weight(recipe, choice))
        except RecipeError as error:
            pattern = choice[0] or 'dense'
            raise RecipeError(
                f'{pattern!r} is among the patterns to choose from (--patterns): {error}'
            ) from None
        for layer in planned:
            if layer.spec is None:
                continue
            weight = weights[layer.name]
            assert weight.kind is not None
            # A bare parameter's layer has no bias: that belongs to the module around it.
            alone = issubclass(weight.kind, Projection)
            tensors = (
                {weight.parameter: weight.weight} if alone else dict(own_tensors(weight.owner))
            )
            stored = stored_bits(
                tensors, weight.parameter, layer.spec, weight.kind.output_axis, weight.kind.inputs
            )
            found.setdefault(layer.name, {})[choice] = Candidate(
                layer.spec,
                stored.total,
                spec_bops(layer.spec, (macs or {}).get(layer.name, 0)),
            )
    for name, options in found.items():
        if len(options) < len(choices):
            raise RecipeError(
                f"a rule leaves '{name}' at full precision where the pattern is dense, so that it"
                ' can be compressed under some choices alone; give that rule a pattern too, or bits'
            )
    free = {
        name: options
        for name, options in found.items()
        if len({replace(option.spec, note='') for option in options.values()}) > 1
    }
    if not free:
        raise RecipeError(
            "the recipe's rules decide every layer's pattern and bits; remove some of them"
        )
    return free
