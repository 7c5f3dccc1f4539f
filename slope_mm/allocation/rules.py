"""The recipe rules of an allocation, and the config that carries them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slope_mm.analysis.plan import base_path, literal
from slope_mm.layers import LayerSpec
from slope_mm.recipe import Recipe


def allocation_rules(
    specs: Mapping[str, LayerSpec], recipe: Recipe, names: Iterable[str]
) -> list[dict[str, Any]]:
    """One rule a layer, complete: what another rule said of the layer is said again.

    Args:
        specs: What the layers get, by name.
        recipe: The recipe that the rules will be appended to.
        names: Names of all layers of the model; a rule must not catch another one.
    """
    names = list(names)
    rules = []
    for name, spec in specs.items():
        catches = any(other.startswith(name + '.') for other in names)
        weight: dict[str, Any] = {
            'sparsity': None if spec.pattern is None else spec.pattern.name,
            'bits': spec.bits,
        }
        if spec.codes != recipe.weight.codes:
            weight['codes'] = spec.codes
        if spec.step != recipe.weight.step:
            weight['step'] = spec.step
        rule: dict[str, Any] = {
            'match': f're:{re.escape(name)}' if catches else name,
            'weight': weight,
        }
        if spec.activation_bits != recipe.activation_bits:
            bits = spec.activation_bits
            rule['activation'] = None if bits is None else {'bits': bits}
        if spec.gradient != recipe.gradient:
            rule['gradient'] = spec.gradient
        if spec.order != recipe.order:
            rule['order'] = spec.order
        rules.append(rule)
    return rules


def with_rules(recipe: Recipe, rules: list[dict[str, Any]]) -> Recipe:
    """The recipe with rules after its own."""
    plain = recipe.to_dict()
    return Recipe.parse({**plain, 'rules': [*plain['rules'], *rules]})


def allocated_config(
    base: str, out: Path, recipe: Recipe, checkpoint: str, comment: str = ''
) -> str:
    """The text of a config that inherits from another and has the allocated rules.

    Args:
        base: Path of the config to inherit from.
        out: Where the text will lie.
        recipe: The recipe with its rules, the allocated ones last.
        checkpoint: What training starts from.
        comment: A first line.
    """
    plain = recipe.to_dict()
    return ''.join(
        [
            f'# {comment}\n' if comment else '',
            f'_base_ = [{base_path(base, out)!r}]\n',
            'model = dict(\n    recipe=dict(\n',
            f'        weight={literal(plain["weight"])},\n',
            '        rules=[\n',
            *(f'            {literal(rule)},\n' for rule in plain['rules']),
            '        ],\n    )\n)\n',
            f'load_from = {checkpoint!r}\n',
        ]
    )
