"""Model surgery: plan, convert (dense to compressed, in place) and bake (compressed to plain)."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slope_mm.errors import RecipeError, SlopeError, nearest
from slope_mm.layers import (
    Composite,
    CompressedLayer,
    FoundWeight,
    LayerSpec,
    Projection,
    composite_kind,
    find_weights,
    stock_type,
)
from slope_mm.layers.fake_quantize import FakeQuantizer, StockFakeQuantize
from slope_mm.layers.reuse import WeightReuse
from slope_mm.layers.standardized import StandardizedWeight
from slope_mm.layers.ties import Tie, compressed_ties
from slope_mm.ops import Pattern
from slope_mm.recipe import Recipe, Rule

ACTIVATIONS = ('drop', 'fake_quant')


@dataclass(frozen=True)
class LayerPlan:
    """What will happen to one parameterised layer.

    Attributes:
        name: Qualified name (its first, where a layer has several).
        module: The layer; of a bare parameter the module that owns it.
        spec: What it gets; None if it stays as it is.
        reason: Why it gets less than the recipe asks for, or nothing; ``''`` if it gets all.
        parameter: Name of the weight in ``module``.
    """

    name: str
    module: nn.Module
    spec: LayerSpec | None
    reason: str
    parameter: str = 'weight'


def plan(model: nn.Module, recipe: Mapping[str, Any] | Recipe) -> list[LayerPlan]:
    """Says what :func:`convert` would do to each parameterised layer, without doing it.

    Args:
        model: A dense model.
        recipe: A recipe or its dict.

    Returns:
        One plan per layer that owns a weight, in the model's order.

    Raises:
        RecipeError: If a rule of the user's matches no layer, or only layers that stay as they are
            and wants something of them; or if no layer can hold the recipe's pattern.
    """
    recipe = Recipe.parse(recipe)
    found = find_weights(model)
    idle = list(recipe.rules)
    plans = []
    for weight in found:
        last = None
        for rule in recipe.all_rules if weight.kind is not None and not weight.obstacle else ():
            if rule.matches(weight.names, weight.types, _input_channels(weight)):
                idle = [user for user in idle if user is not rule]
                last = rule
        plans.append(_plan_layer(weight, recipe, last))
    _refuse_idle_rules(idle, found)
    _refuse_hopeless_pattern(recipe, plans)
    return plans


def _input_channels(weight: FoundWeight) -> int:
    if weight.kind is not None and issubclass(weight.kind, Projection):
        # Attention's keys and values may have other channels than its queries.
        return weight.weight.shape[weight.kind.input_axis]
    for attribute in ('in_features', 'in_channels'):
        if getattr(weight.owner, attribute, None):
            return int(getattr(weight.owner, attribute))
    return 0


def _plan_layer(weight: FoundWeight, recipe: Recipe, rule: Rule | None) -> LayerPlan:
    def planned(spec: LayerSpec | None, reason: str) -> LayerPlan:
        return LayerPlan(weight.name, weight.owner, spec, reason, weight.parameter)

    if weight.kind is None or weight.obstacle:
        return planned(None, weight.obstacle)
    spec = recipe.spec(rule)
    if spec is None:
        return planned(None, '' if rule is None else rule.reason or f'rule {rule.match!r}')
    if spec.pattern is not None:
        note = _no_sparsity(weight, weight.kind, spec.pattern)
        if note:
            spec = replace(spec, pattern=None, note=f'{note}: no sparsity')
    if not spec.compresses:
        return planned(None, spec.note or 'the recipe asks for nothing here')
    return planned(spec, spec.note)


def _no_sparsity(weight: FoundWeight, kind: type[CompressedLayer], pattern: Pattern) -> str:
    """Why a weight cannot hold a pattern, or ``''``."""
    groups = int(getattr(weight.owner, 'groups', 1))
    channels = weight.weight.shape[kind.input_axis]
    if kind.input_axis == 0:
        # A transposed convolution's groups lie one behind the other along this axis.
        channels //= groups
    if channels == 1 and groups > 1:
        return 'depthwise'
    if not pattern.fits(channels):
        a_group = ' a group' if groups > 1 else ''
        return f'{channels} input channels{a_group} hold no {pattern.name}'
    return ''


def _refuse_idle_rules(idle: list[Rule], found: Sequence[FoundWeight]) -> None:
    names = [name for weight in found for name in weight.names]
    # A prefix is as good a target as a whole name.
    prefixes = [name.rsplit('.', depth)[0] for name in names for depth in range(4)]
    for rule in idle:
        stays = [w for w in found if rule.matches(w.names, w.types, _input_channels(w))]
        if stays and not rule.compress:
            # They stay as they are anyway.
            continue
        if stays:
            reasons = sorted({weight.obstacle for weight in stays})
            raise RecipeError(
                f"the recipe's rule match={rule.match!r} speaks of '{stays[0].name}', which stays"
                f' as it is ({"; ".join(reasons[:3])}); remove the rule'
            )
        raise RecipeError(
            f"the recipe's rule match={rule.match!r} matches no layer of this model"
            f'{nearest(rule.match.split(":", 1)[-1], prefixes)}{_spelling(rule.match, names)};'
            ' correct or remove it (tools/report.py prints the names)'
        )


def _spelling(match: str, names: Sequence[str]) -> str:
    """A word about how a rule that matches nothing is written, or ``''``."""
    if match.startswith('re:'):
        if any(re.search(match[3:], name) for name in names):
            return f"; an expression has to match whole names: 're:.*(?:{match[3:]}).*'"
    elif not match.startswith(('type:', 'in:')) and ('*' in match or '?' in match):
        return "; names are no globs: write a prefix, or 're:' and a regular expression"
    return ''


def _refuse_hopeless_pattern(recipe: Recipe, plans: list[LayerPlan]) -> None:
    wanted = recipe.weight.sparsity
    specs = [p.spec for p in plans if p.spec is not None]
    if not specs:
        raise RecipeError(
            'the recipe compresses no layer of this model:'
            f' {"; ".join(sorted({p.reason for p in plans})[:5]) or "it has no weights"}; choose'
            ' another pattern, or change the rules'
        )
    if wanted is not None and not any(spec.pattern for spec in specs):
        raise RecipeError(
            f"no layer of this model can hold the recipe's sparsity '{wanted.name}'"
            f' ({"; ".join(sorted({s.note for s in specs if s.note})[:3])}); choose another pattern'
        )


def convert(model: nn.Module, recipe: Mapping[str, Any] | Recipe) -> nn.Module:
    """Compresses the eligible layers of a model in place.

    A layer keeps its identity, its name and its ``weight``; its class becomes a compressed one
    and it gains what the compression learns. Everything is validated first, so that a model whose
    recipe is refused is left untouched. A warning names parameters that several layers share (the
    same layer under several names is one layer, and no such case).

    Args:
        model: A dense model; mmdet's, or any other.
        recipe: A recipe or its dict.

    Returns:
        The same object.

    Raises:
        RecipeError: If the recipe is invalid or does not fit the model.
        SlopeError: If the model is compressed already.
    """
    already = next(iter(compressed_layers(model)), None)
    if already is not None:
        raise SlopeError(
            f"the model is compressed already (layer '{already}'); convert a dense model, or bake"
            ' this one first'
        )
    start_layers(model, {p.name: p.spec for p in plan(model, recipe) if p.spec is not None})
    WeightReuse.attach(model)
    for tie in compressed_ties(model):
        warnings.warn(
            f"'{tie.keys[0]}' and '{tie.keys[1]}' are one parameter, of which each layer makes a"
            ' weight of its own: the model trains, but no packed or stock file can hold it. Leave'
            ' both layers alone (dict(match=..., compress=False)), or untie them before training',
            stacklevel=2,
        )
    return model


def start_layers(model: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
    """Compresses the layers of these (first) names, and what uses their weights directly."""
    for weight in find_weights(model):
        spec = specs.get(weight.name)
        if spec is None or weight.kind is None or weight.layer is not None:
            continue
        layer: nn.Module = weight.owner
        if issubclass(weight.kind, Projection):
            layer = weight.kind(weight.owner, weight.parameter)
            weight.owner.add_module(weight.name.rpartition('.')[2], layer)
        else:
            layer.__class__ = weight.kind
        layer.start_compression(spec)  # type: ignore[operator]
    for module in list(model.modules()):
        composite = composite_kind(type(module))
        if composite is not None and composite.concerned(module):
            module.__class__ = composite


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by their qualified stock names, each layer once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}


def bake(model: nn.Module, activations: str = 'drop', inplace: bool = False) -> nn.Module:
    """Makes a plain model whose weights are the compressed ones.

    Its layers have their stock classes and its state dict loads into the stock model with
    ``strict=True``. Weight-standardized convolutions alone become plain ones, whose state dict the
    stock model refuses (it would standardize again); a warning names them. So it does with a weight
    that was one parameter in several layers which compress it differently: each gets its own.

    Args:
        model: A compressed model.
        activations: ``'drop'`` computes with full-precision inputs (for A4 recipes another
            function than the trained one); ``'fake_quant'`` keeps the input quantizers as torch's
            own fake-quantize in forward pre-hooks, without state. An input without a range (it held
            zeros alone, as the first values of DETR's decoder do) is not quantized, as before.
        inplace: Bake this model instead of a copy; the latent weights are lost.

    Returns:
        The baked model.

    Raises:
        SlopeError: If ``activations`` is unknown, or no quantizer that is to be kept has a range.
    """
    if activations not in ACTIVATIONS:
        raise SlopeError(
            f'bake(activations={activations!r}) is unknown; choose one of {list(ACTIVATIONS)}'
        )
    if activations == 'fake_quant':
        _check_ranges(model)
    if not inplace:
        model = copy.deepcopy(model)
    keep = activations == 'fake_quant'
    composites = [module for module in model.modules() if isinstance(module, Composite)]
    uncalled = {layer for module in composites for layer in module.used_layers()}
    if keep:
        for module in composites:
            module.keep_quantizers()
    _warn_of_settled(model)
    ties = compressed_ties(model)
    for tie in ties:
        tie.part()
    for module in composites:
        module.settle()
    for layer in compressed_layers(model).values():
        _bake_layer(layer, FakeQuantizer.of(layer) if keep and layer not in uncalled else None)
    for module in composites:
        module.__class__ = module.baked_type or stock_type(module)  # type: ignore[assignment]
    _warn_of_broken_ties([tie for tie in ties if not tie.join()])
    WeightReuse.detach(model)
    # What SlopeModel put before the stock one speaks of compressed layers.
    model.__dict__.pop('init_weights', None)
    _detach_hooks(model)
    return model


def _check_ranges(model: nn.Module) -> None:
    quantizing = {
        name: layer
        for name, layer in compressed_layers(model).items()
        if layer.slope_spec.activation_bits is not None
    }
    without = [name for name, layer in quantizing.items() if not layer.calibrated]
    ranges = [
        layer.input_signed(which) is not None
        for layer in quantizing.values()
        for which in range(layer.inputs)
    ]
    if without and not any(ranges):
        raise SlopeError(
            f"{len(without)} input quantizers have no range yet ('{without[0]}', ...);"
            ' train or calibrate before baking'
        )
    if without:
        warnings.warn(
            f"{len(without)} layers ('{without[0]}', ...) have an input without a range, which"
            ' stays unquantized: calibration and training saw nothing there, or zeros alone',
            stacklevel=3,
        )


def _detach_hooks(model: nn.Module) -> None:
    """Removes the root's hooks that are about its compression."""
    for hooks in (model._forward_pre_hooks, model._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            # torch wraps a hook that wants the module.
            if getattr(getattr(hook, 'hook', hook), 'of_compression', False):
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)


def settled_layers(model: nn.Module) -> list[str]:
    """Layers of a compressed model whose baked weights the stock layer cannot hold."""
    layers = compressed_layers(model)
    return [name for name, layer in layers.items() if isinstance(layer, StandardizedWeight)]


def _warn_of_settled(model: nn.Module) -> None:
    names = settled_layers(model)
    if names:
        warnings.warn(
            f"{len(names)} weight-standardized convolutions ('{names[0]}', ...) are plain ones in"
            ' the baked model, which the stock config does not build: it would standardize their'
            ' weights again, and its strict load refuses them. Use the baked model as it is, or a'
            ' packed file',
            stacklevel=3,
        )


def _warn_of_broken_ties(ties: list[Tie]) -> None:
    for tie in ties:
        warnings.warn(
            f"'{tie.keys[0]}' and '{tie.keys[1]}' were one parameter; the baked model has two, as"
            ' their layers compress it differently. A stock model, in which they are one, cannot'
            ' hold both; use the baked model as it is, or leave both layers alone'
            ' (dict(match=..., compress=False))',
            stacklevel=3,
        )


@torch.no_grad()
def _bake_layer(layer: CompressedLayer, quantizer: FakeQuantizer | None) -> None:
    layer.end_sharing()
    layer.weight.copy_(layer.compressed_weight())
    if isinstance(layer, Projection):
        layer.leave()
        return
    layer.stop_compression()
    layer.settle()
    hook = layer.baked_hook or StockFakeQuantize
    layer.__class__ = layer.baked_type or stock_type(layer)  # type: ignore[assignment]
    if quantizer is not None:
        hook(quantizer).register(layer)


def pattern_name(spec: LayerSpec | None) -> str:
    """``'2:4'``, ``'dense'`` or ``''`` for a layer that stays as it is."""
    if spec is None:
        return ''
    return spec.pattern.name if spec.pattern is not None else 'dense'
