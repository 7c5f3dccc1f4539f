"""Model surgery: plan, convert (dense to compressed, in place) and bake (compressed to plain)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.errors import RecipeError, SlopeError, nearest
from slope_mm.layers import LAYER_KINDS, STOCK_KINDS, CompressedLayer, LayerSpec
from slope_mm.layers.reuse import WeightReuse
from slope_mm.ops import activation_codes, positive
from slope_mm.recipe import Recipe, Rule

ACTIVATIONS = ('drop', 'fake_quant')


@dataclass(frozen=True)
class LayerPlan:
    """What will happen to one parameterised layer.

    Attributes:
        name: Qualified name (its first, where a layer has several).
        module: The layer.
        spec: What it gets; None if it stays as it is.
        reason: Why it gets less than the recipe asks for, or nothing; ``''`` if it gets all.
    """

    name: str
    module: nn.Module
    spec: LayerSpec | None
    reason: str


def plan(model: nn.Module, recipe: Mapping[str, Any] | Recipe) -> list[LayerPlan]:
    """Says what :func:`convert` would do to each parameterised layer, without doing it.

    Args:
        model: A dense model.
        recipe: A recipe or its dict.

    Returns:
        One plan per layer that owns a weight, in the model's order.

    Raises:
        RecipeError: If a rule of the user's matches no layer, or no layer can hold the recipe's
            pattern.
    """
    recipe = Recipe.parse(recipe)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    rules = recipe.all_rules
    idle = list(recipe.rules)
    plans = []
    for module, aliases in names.items():
        kind = LAYER_KINDS.get(type(module))
        if kind is None:
            if _owns_weight(module):
                reason = f'no compressed kind of {type(module).__name__}'
                plans.append(LayerPlan(aliases[0], module, None, reason))
            continue
        if 'weight' not in module._parameters:
            # Spectral norm and its kin compute the weight anew before every forward.
            plans.append(LayerPlan(aliases[0], module, None, 'its weight is computed by a hook'))
            continue
        types = [cls.__name__ for cls in type(module).__mro__]
        last = None
        for rule in rules:
            if rule.matches(aliases, types, _input_channels(module)):
                idle = [user for user in idle if user is not rule]
                last = rule
        plans.append(_plan_layer(aliases[0], module, kind, recipe, last))
    _refuse_idle_rules(idle, [n for plan in plans for n in names[plan.module]])
    _refuse_hopeless_pattern(recipe, plans)
    return plans


def _owns_weight(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters(recurse=False))


def _input_channels(module: nn.Module) -> int:
    channels = getattr(module, 'in_features', None) or getattr(module, 'in_channels', None)
    return int(channels or 0)


def _plan_layer(
    name: str,
    module: nn.Module,
    kind: type[CompressedLayer],
    recipe: Recipe,
    rule: Rule | None,
) -> LayerPlan:
    spec = recipe.spec(rule)
    if spec is None:
        reason = '' if rule is None else rule.reason or f'rule {rule.match!r}'
        return LayerPlan(name, module, None, reason)
    if spec.pattern is not None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        channels = weight.shape[kind.input_axis]
        note = ''
        if getattr(module, 'groups', 1) > 1:
            note = f'grouped ({module.groups}): no sparsity'
        elif not spec.pattern.fits(channels):
            note = f'{channels} input channels hold no {spec.pattern.name}: no sparsity'
        if note:
            spec = replace(spec, pattern=None, note=note)
    if not spec.compresses:
        return LayerPlan(name, module, None, spec.note or 'the recipe asks for nothing here')
    return LayerPlan(name, module, spec, spec.note)


def _refuse_idle_rules(idle: list[Rule], names: list[str]) -> None:
    # A prefix is as good a target as a whole name.
    prefixes = [name.rsplit('.', depth)[0] for name in names for depth in range(4)]
    for rule in idle:
        raise RecipeError(
            f"the recipe's rule match={rule.match!r} matches no layer of this model"
            f'{nearest(rule.match.split(":", 1)[-1], prefixes)}; correct or remove it'
            ' (tools/report.py prints the names)'
        )


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
    recipe is refused is left untouched.

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
    for layer in plan(model, recipe):
        if layer.spec is not None:
            layer.module.__class__ = LAYER_KINDS[type(layer.module)]
            layer.module.start_compression(layer.spec)  # type: ignore[operator]
    WeightReuse.attach(model)
    return model


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by their qualified stock names, each layer once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}


class StockFakeQuantize:
    """A forward pre-hook that quantizes a layer's input with torch's own operator.

    It holds plain numbers, so a model's state dict stays the stock one.
    """

    def __init__(self, step: float, low: int, high: int) -> None:
        self.step, self.low, self.high = step, low, high

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        return (torch.fake_quantize_per_tensor_affine(x, self.step, 0, self.low, self.high), *rest)


def bake(model: nn.Module, activations: str = 'drop', inplace: bool = False) -> nn.Module:
    """Makes a plain model whose weights are the compressed ones.

    Its layers have their stock classes and its state dict loads into the stock model with
    ``strict=True``.

    Args:
        model: A compressed model.
        activations: ``'drop'`` computes with full-precision inputs (for A4 recipes another
            function than the trained one); ``'fake_quant'`` keeps the input quantizers as torch's
            own fake-quantize in forward pre-hooks, without state.
        inplace: Bake this model instead of a copy; the latent weights are lost.

    Returns:
        The baked model.

    Raises:
        SlopeError: If ``activations`` is unknown, or an input quantizer to keep has no range yet.
    """
    if activations not in ACTIVATIONS:
        raise SlopeError(
            f'bake(activations={activations!r}) is unknown; choose one of {list(ACTIVATIONS)}'
        )
    uncalibrated = [n for n, layer in compressed_layers(model).items() if not layer.calibrated]
    if activations == 'fake_quant' and uncalibrated:
        raise SlopeError(
            f"{len(uncalibrated)} input quantizers have no range yet ('{uncalibrated[0]}', ...);"
            ' train or calibrate before baking'
        )
    if not inplace:
        model = copy.deepcopy(model)
    for layer in compressed_layers(model).values():
        _bake_layer(layer, keep_activation=activations == 'fake_quant')
    WeightReuse.detach(model)
    return model


@torch.no_grad()
def _bake_layer(layer: CompressedLayer, keep_activation: bool) -> None:
    layer.end_sharing()
    layer.weight.copy_(layer.compressed_weight())
    bits, signed = layer.slope_spec.activation_bits, layer.activation_signed
    hook = None
    if (
        keep_activation
        and bits is not None
        and signed is not None
        and layer.slope_act_step is not None
    ):
        codes = activation_codes(bits, signed)
        hook = StockFakeQuantize(float(positive(layer.slope_act_step)), codes.qn, codes.qp)
    layer.stop_compression()
    layer.__class__ = STOCK_KINDS[type(layer)]  # type: ignore[assignment]
    if hook is not None:
        layer.register_forward_pre_hook(hook)


def pattern_name(spec: LayerSpec | None) -> str:
    """``'2:4'``, ``'dense'`` or ``''`` for a layer that stays as it is."""
    if spec is None:
        return ''
    return spec.pattern.name if spec.pattern is not None else 'dense'
