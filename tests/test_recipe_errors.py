"""Recipes that are refused: what the message says, and that the model stays untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_cases import RECIPES, W4A4, WEIGHT, Net
from torch import nn

import slope_mm
from slope_mm import RecipeError


def rules(*given_rules: Any) -> dict[str, Any]:
    return dict(W4A4, rules=list(given_rules))


# What is wrong, and the parts of the message: what, where, what to do.
REFUSED: dict[str, tuple[Any, list[str]]] = {
    'not a dict': ('w4a4', ['the recipe is a str', 'write recipe=dict(weight=']),
    'nothing at all': (None, ['the recipe is a NoneType', 'write recipe=dict(']),
    'no weight': (dict(activation=dict(bits=4)), ["no 'weight' part", 'write weight=dict(']),
    'weight is a number': (dict(weight=4), ["the recipe's weight is 4", 'write a dict']),
    'unknown key': (
        dict(W4A4, wieght=WEIGHT),
        ["the recipe has the unknown key 'wieght'", "nearest: 'weight'", 'allowed: weight,'],
    ),
    'unknown weight key': (
        dict(weight=dict(sparsitty='2:4')),
        ["the recipe's weight has the unknown key 'sparsitty'", "nearest: 'sparsity'", 'allowed:'],
    ),
    'unknown activation key': (
        dict(weight=WEIGHT, activation=dict(bit=4)),
        ["the recipe's activation has the unknown key 'bit'", "nearest: 'bits'"],
    ),
    'activation is a number': (
        dict(weight=WEIGHT, activation=4),
        ["the recipe's activation is 4", 'write dict(bits=4), or None'],
    ),
    'pattern reversed': (
        dict(weight=dict(sparsity='4:2')),
        ["the recipe's weight", "'4:2' is not a pattern", 'kept', "did you mean '2:4'"],
    ),
    'pattern too long': (dict(weight=dict(sparsity='2:64')), ["'2:64'", '1 <= N < M <= 32']),
    'pattern keeps all': (dict(weight=dict(sparsity='4:4')), ["'4:4'", '1 <= N < M']),
    'pattern keeps none': (dict(weight=dict(sparsity='0:4')), ["'0:4'", '1 <= N < M']),
    'no pattern': (dict(weight=dict(sparsity='half')), ["sparsity 'half'", "write 'N:M'"]),
    'a number as pattern': (dict(weight=dict(sparsity=0.5)), ['sparsity 0.5', "write 'N:M'"]),
    'density over 1': (
        dict(weight=dict(sparsity='unstructured:2')),
        ['unstructured:2', 'above 0 and at most 1'],
    ),
    '1 bit': (
        dict(weight=dict(bits=1)),
        ["the recipe's weight", 'bits=1', 'integer from 2 to 8, or None'],
    ),
    '9 bits': (dict(weight=dict(bits=9)), ['bits=9', 'from 2 to 8']),
    'bits as text': (dict(weight=dict(bits='4')), ["bits='4'", 'from 2 to 8']),
    'bits as truth': (dict(weight=dict(bits=True)), ['bits=True', 'from 2 to 8']),
    '1 activation bit': (
        dict(weight=WEIGHT, activation=dict(bits=1)),
        ["the recipe's activation", 'bits=1', 'from 2 to 8'],
    ),
    'unknown codes': (
        dict(weight=dict(bits=4, codes='symetric')),
        ["the recipe's weight", "codes='symetric'", "nearest: 'symmetric'", 'choose one of'],
    ),
    'a list of codes': (dict(weight=dict(bits=4, codes=['lsq'])), ["codes=['lsq']", 'choose']),
    'unknown step': (
        dict(weight=dict(bits=4, step='channels')),
        ["the recipe's weight step is 'channels'", "nearest: 'channel'"],
    ),
    'unknown gradient': (
        dict(weight=WEIGHT, gradient='srste'),
        ["the recipe's gradient is 'srste'", "nearest: 'sr_ste'"],
    ),
    'unknown order': (
        dict(weight=WEIGHT, order='q_then_p'),
        ["the recipe's order is 'q_then_p'", "nearest: 'q_then_s'"],
    ),
    'nothing to do': (dict(weight={}), ['compresses nothing', 'give weight sparsity']),
    'nothing to do, in many words': (
        dict(weight=dict(bits=None), activation=None, rules=[dict(match='head', compress=True)]),
        ['compresses nothing', 'or in a rule'],
    ),
    'rules are a dict': (dict(W4A4, rules=dict(match='head')), ['rules are not a list']),
    'rules are a text': (dict(W4A4, rules='head'), ['rules are not a list']),
    'rule is a text': (rules('head'), ["rule 0 of the recipe is 'head'", "write dict(match='...'"]),
    'rule without match': (
        rules(dict(match='head'), dict(compress=False)),
        ["rule 1 of the recipe has no 'match'", "'re:...', 'type:...' or 'in:...'"],
    ),
    'empty match': (rules(dict(match='')), ["has no 'match'"]),
    'unknown rule key': (
        rules(dict(match='head', wight=WEIGHT)),
        ["rule 0 of the recipe has the unknown key 'wight'", "nearest: 'weight'"],
    ),
    'bad bits in a rule': (
        rules(dict(match='neck'), dict(match='head', weight=dict(bits=12))),
        ["rule 1 of the recipe (match='head')'s weight", 'bits=12', 'from 2 to 8'],
    ),
    'bad pattern in a rule': (
        rules(dict(match='head', weight=dict(sparsity='8:2'))),
        ["(match='head')", "did you mean '2:8'"],
    ),
    'bad activation in a rule': (
        rules(dict(match='head', activation=dict(bits=0))),
        ["(match='head')'s activation", 'bits=0'],
    ),
    'soft gradient without groups': (
        dict(weight=dict(sparsity='unstructured:0.5', bits=4), gradient='soft'),
        ["gradient='soft' with unstructured:0.5", 'needs an N:M pattern'],
    ),
    'soft gradient of the other order': (
        rules(dict(match='head', gradient='soft', order='q_then_s')),
        ["the rule match='head' combines gradient='soft'", "order='s_then_q'"],
    ),
    'bad gradient in a rule': (
        rules(dict(match='head', gradient='st')),
        ["(match='head'): gradient is 'st'", "nearest: 'ste'"],
    ),
    'bad order in a rule': (rules(dict(match='head', order=1)), ["(match='head'): order is 1"]),
    'compress is no truth': (
        rules(dict(match='head', compress='no')),
        ["(match='head') has compress='no'", 'True or False'],
    ),
    'bad expression': (
        rules(dict(match='re:(')),
        ["(match='re:(') is not a regular expression"],
    ),
    'rule matches nothing': (
        rules(dict(match='head'), dict(match='hed.fc')),
        ["match='hed.fc' matches no layer", "nearest: 'head.fc'", 'correct or remove it'],
    ),
    'prefix matches nothing': (
        rules(dict(match='backbone.layer2', weight=dict(bits=8))),
        ["match='backbone.layer2' matches no layer", "'backbone.layer1'"],
    ),
    'half a name': (
        rules(dict(match='backbone.lay')),
        ["match='backbone.lay' matches no layer", 'nearest:'],
    ),
    'expression matches nothing': (
        rules(dict(match='re:conv1')),
        ["match='re:conv1' matches no layer", 'nearest:', "whole names: 're:.*(?:conv1).*'"],
    ),
    'a glob': (
        rules(dict(match='backbone.*')),
        ["match='backbone.*' matches no layer", 'no globs: write a prefix'],
    ),
    'rules as text': (
        rules("{'match':'head'}"),
        ['rule 0 of the recipe is', 'in a config file', '--cfg-options takes no dicts'],
    ),
    'type matches nothing': (
        rules(dict(match='type:Conv3d')),
        ["match='type:Conv3d' matches no layer", 'correct or remove'],
    ),
    'a norm cannot be compressed': (rules(dict(match='type:BatchNorm2d')), ['matches no layer']),
    'a pattern no layer can hold': (
        dict(weight=dict(sparsity='2:31', bits=4)),
        ["no layer of this model can hold the recipe's sparsity '2:31'", '16 input channels',
         'choose another pattern'],
    ),
    'a pattern no layer can hold, without bits': (
        dict(weight=dict(sparsity='2:31')),
        ['compresses no layer of this model', 'hold no 2:31', 'choose another pattern'],
    ),
    'everything excluded': (
        rules(dict(match='re:.*', compress=False)),
        ['compresses no layer of this model', "rule 're:.*'", 'change the rules'],
    ),
}  # fmt: skip


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a conversion could have touched."""
    return [
        (name, id(module), type(module), sorted(vars(module)), list(module._buffers))
        for name, module in model.named_modules(remove_duplicate=False)
    ] + [
        (name, id(tensor), tensor.detach().numpy().tobytes())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_is_told_what_where_and_what_to_do(case: str) -> None:
    recipe, parts = REFUSED[case]
    model = Net()
    before = fingerprint(model)
    with pytest.raises(RecipeError) as raised:
        slope_mm.convert(model, recipe)
    for part in parts:
        assert part in str(raised.value)
    assert fingerprint(model) == before


class ScaledConv2d(nn.Conv2d):
    """A convolution of one's own, of which no compressed kind is known."""


def net_with_a_layer_that_stays() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), ScaledConv2d(16, 16, 3), nn.Conv2d(16, 16, 3))


@pytest.mark.parametrize('match', ['1', 'type:ScaledConv2d'])
def test_a_rule_may_leave_out_what_stays_as_it_is(match: str) -> None:
    model = slope_mm.convert(
        net_with_a_layer_that_stays(), rules(dict(match=match, compress=False))
    )
    assert list(slope_mm.compressed_layers(model)) == ['0', '2']


@pytest.mark.parametrize('wanted', [dict(weight=dict(bits=8)), dict(compress=True)])
def test_a_rule_that_wants_something_of_it_is_told_why_not(wanted: dict[str, Any]) -> None:
    model = net_with_a_layer_that_stays()
    before = fingerprint(model)
    with pytest.raises(RecipeError) as raised:
        slope_mm.convert(model, rules(dict(match='1', **wanted)))
    for part in ("speaks of '1'", 'no compressed kind of ScaledConv2d', 'remove the rule'):
        assert part in str(raised.value)
    assert 'nearest' not in str(raised.value) and fingerprint(model) == before


BREAKS = st.sampled_from(
    [
        lambda recipe: recipe['weight'].update(bits=1),
        lambda recipe: recipe['weight'].update(sparsity='3:2'),
        lambda recipe: recipe['weight'].update(extra=1),
        lambda recipe: recipe.update(activation=dict(bits=99)),
        lambda recipe: recipe.update(gradient='none'),
        lambda recipe: recipe.update(extra=None),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='nowhere')),
        lambda recipe: recipe.setdefault('rules', []).insert(0, dict(match='type:Conv1d')),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='head', weight=4)),
        lambda recipe: recipe.setdefault('rules', []).append(dict(match='re:.*', compress=False)),
    ]
)


@settings(deadline=None, max_examples=60)
@given(RECIPES, BREAKS)
def test_a_refused_recipe_leaves_the_model_untouched(
    given_recipe: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    recipe = copy.deepcopy(given_recipe)
    spoil(recipe)
    model = Net()
    before = fingerprint(model)
    with pytest.raises(RecipeError):
        slope_mm.convert(model, recipe)
    assert fingerprint(model) == before


def test_the_fingerprint_notices_a_conversion() -> None:
    model = Net()
    before = fingerprint(model)
    slope_mm.convert(model, W4A4)
    assert fingerprint(model) != before
