"""The recipe: what each form means, and that it reads back from its dict."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from mmengine.config import Config, ConfigDict
from recipe_cases import CONFIGS, RECIPES, W4A4, WEIGHT, Net, specs
from torch import nn

import slope_mm
from slope_mm import Recipe, RecipeError
from slope_mm.layers import LayerSpec
from slope_mm.ops import NMPattern, UnstructuredPattern


def spec(recipe: dict[str, Any], name: str) -> LayerSpec:
    found = specs(recipe)[name]
    assert found is not None
    return found


# --- what a recipe means -------------------------------------------------------------------------


def test_everything_but_the_weight_has_a_default() -> None:
    assert spec(dict(weight=dict(bits=4)), 'head.fc') == LayerSpec(bits=4)
    made = spec(dict(weight=dict(sparsity='2:8')), 'head.fc')
    assert made == LayerSpec(
        NMPattern(2, 8), None, 'lsq', 'channel', None, 'ste', 's_then_q', note=''
    )


def test_every_key_reaches_the_layer() -> None:
    recipe = dict(
        weight=dict(sparsity='unstructured:0.25', bits=3, codes='odd', step='tensor'),
        activation=dict(bits=6),
        gradient='sr_ste',
        order='q_then_s',
    )
    assert spec(recipe, 'neck.0') == LayerSpec(
        UnstructuredPattern(0.25), 3, 'odd', 'tensor', 6, 'sr_ste', 'q_then_s'
    )


def test_a_rule_overrides_what_it_names_and_falls_back_for_the_rest() -> None:
    rule = dict(match='head.fc', weight=dict(bits=8), gradient='masked')
    recipe = dict(weight=dict(WEIGHT, codes='symmetric'), activation=dict(bits=4), rules=[rule])
    assert spec(recipe, 'head.fc') == LayerSpec(
        NMPattern(2, 4), 8, 'symmetric', 'channel', 4, 'masked', 's_then_q'
    )
    assert spec(recipe, 'neck.0') == spec(dict(recipe, rules=[]), 'neck.0')


def test_a_rule_may_override_each_part() -> None:
    def with_rule(**rule: Any) -> LayerSpec:
        return spec(dict(W4A4, rules=[dict(match='head.fc', **rule)]), 'head.fc')

    assert with_rule() == LayerSpec(NMPattern(2, 4), 4, activation_bits=4)
    assert with_rule(weight=dict(sparsity='2:8')).pattern == NMPattern(2, 8)
    assert with_rule(weight=dict(sparsity=None)).pattern is None
    assert with_rule(weight=dict(bits=None)).bits is None
    assert with_rule(weight=dict(codes='odd')).codes == 'odd'
    assert with_rule(weight=dict(step='tensor')).step == 'tensor'
    assert with_rule(activation=dict(bits=8)).activation_bits == 8
    assert with_rule(activation=None).activation_bits is None
    assert with_rule(activation=dict(bits=None)).activation_bits is None
    assert with_rule(order='q_then_s').order == 'q_then_s'
    assert with_rule(weight=None) == LayerSpec(activation_bits=4)


def test_the_last_match_wins_as_a_whole() -> None:
    """What an earlier rule said is forgotten; the recipe's own values are the fallback."""
    rules = [
        dict(match='backbone', weight=dict(bits=8), activation=None),
        dict(match='backbone.layer1', weight=dict(sparsity=None)),
        dict(match='backbone.layer1.1.conv2', compress=False),
    ]
    found = specs(dict(W4A4, rules=rules))
    assert found['backbone.layer10.conv1'] == LayerSpec(NMPattern(2, 4), 8)
    assert found['backbone.layer1.0.conv1'] == LayerSpec(None, 4, activation_bits=4)
    assert found['backbone.layer1.1.conv2'] is None
    assert found['neck.0'] == LayerSpec(NMPattern(2, 4), 4, activation_bits=4)
    # Put first, it is overruled.
    rules = [rules[2], *rules[:2]]
    assert specs(dict(W4A4, rules=rules))['backbone.layer1.1.conv2'] is not None


def test_a_users_rule_overrules_the_built_in_ones() -> None:
    assert spec(W4A4, 'head.fc_cls').bits == 8
    recipe = dict(W4A4, rules=[dict(match='head', weight=dict(bits=5))])
    assert spec(recipe, 'head.fc_cls') == LayerSpec(NMPattern(2, 4), 5, activation_bits=4)


ALL = {
    'backbone.conv1',
    'backbone.layer1.0.conv1',
    'backbone.layer1.0.conv2',
    'backbone.layer1.1.conv1',
    'backbone.layer1.1.conv2',
    'backbone.layer10.conv1',
    'backbone.layer10.conv2',
    'neck.0',
    'neck.1',
    'head.fc',
    'head.fc_cls',
}


@pytest.mark.parametrize(
    ('match', 'expected'),
    [
        ('head.fc', {'head.fc'}),
        ('head', {'head.fc', 'head.fc_cls'}),
        ('backbone.layer1', {name for name in ALL if name.startswith('backbone.layer1.')}),
        ('backbone.layer1.1', {'backbone.layer1.1.conv1', 'backbone.layer1.1.conv2'}),
        ('re:.*conv2', {name for name in ALL if name.endswith('conv2')}),
        ('re:neck', set()),
        ('re:neck.*', {'neck.0', 'neck.1'}),
        (r're:.*\.layer\d+\.conv1', {'backbone.layer10.conv1'}),
        ('type:Linear', {'head.fc', 'head.fc_cls'}),
        ('type:ConvTranspose2d', {'neck.1'}),
        ('type:_ConvNd', {name for name in ALL if not name.startswith('head')}),
        ('in:16', {'backbone.layer10.conv1', 'backbone.layer10.conv2', 'neck.0', 'neck.1'}
         | {'head.fc_cls'}),
        ('in:3', {'backbone.conv1'}),
    ],
)  # fmt: skip
def test_what_a_rule_matches(match: str, expected: set[str]) -> None:
    recipe = dict(W4A4, rules=[dict(match=match, compress=False)])
    if not expected:
        with pytest.raises(RecipeError, match='matches no layer'):
            specs(recipe)
        return
    assert {name for name, found in specs(recipe).items() if found is None} == expected


def test_attentions_projections_have_channels_of_their_own() -> None:
    model = nn.ModuleDict(dict(a=nn.MultiheadAttention(16, 2, kdim=8, vdim=12)))
    for channels, matched in {
        16: {'a.q_proj', 'a.out_proj'},
        8: {'a.k_proj'},
        12: {'a.v_proj'},
    }.items():
        recipe = dict(
            weight=dict(bits=4), rules=[dict(match=f'in:{channels}', weight=dict(bits=5))]
        )
        found = {name for name, made in specs(recipe, model).items() if made.bits == 5}
        assert found == matched


def test_a_rule_that_excludes_a_teacher_is_no_rule_for_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(8, 8), nn.Linear(8, 8)

    rules = [
        dict(match='re:(?!teacher).*', weight=dict(bits=8)),
        dict(match='student', weight=dict(bits=3)),
    ]
    found = specs(dict(weight=dict(bits=4), rules=rules), Both())
    # The last rule that matches counts, whatever words the ones before it have.
    assert found['student'].bits == 3
    assert found['teacher'] is None
    named = specs(
        dict(weight=dict(bits=4), rules=[dict(match='teacher', weight=dict(bits=5))]), Both()
    )
    assert named['teacher'].bits == 5


def test_channels_are_those_of_the_layer_not_of_a_group() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(3, 8, 1)
    )
    recipe = dict(weight=dict(bits=4), rules=[dict(match='in:6', weight=dict(bits=5))])
    found = {name: made.bits for name, made in specs(recipe, model).items() if made}
    assert found == {'0': 5, '1': 4, '2': 8}
    with pytest.raises(RecipeError, match="'in:1' matches no layer"):
        specs(dict(weight=dict(bits=4), rules=[dict(match='in:1', compress=False)]), model)


def test_a_recipe_may_compress_through_its_rules_alone() -> None:
    recipe = dict(weight={}, rules=[dict(match='neck', weight=dict(sparsity='2:4', bits=4))])
    found = specs(recipe)
    assert {name for name, made in found.items() if made} == {'neck.0', 'neck.1'}


@pytest.mark.parametrize('wrap', [dict, ConfigDict, lambda d: Config(dict(recipe=d)).recipe])
def test_a_recipe_may_come_from_a_config(wrap: Callable[[dict[str, Any]], Any]) -> None:
    """mmengine's dicts, with the scopes that ``mmdet::`` bases put on every level."""
    rule = dict(match='head', weight=dict(bits=8, _scope_='mmdet'), _scope_='mmdet')
    given = dict(
        weight=dict(WEIGHT, _scope_='mmdet'),
        activation=dict(bits=4, _scope_='mmdet'),
        rules=[rule],
        _scope_='mmdet',
    )
    plain = dict(W4A4, rules=[dict(match='head', weight=dict(bits=8))])
    assert Recipe.parse(wrap(given)) == Recipe.parse(plain)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('_base_/recipes/*.py')), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_valid(path: Path) -> None:
    config = Config.fromfile(path)
    recipe = Recipe.parse(config.recipe)
    assert slope_mm.plan(Net(), recipe)
    assert Recipe.parse(recipe.to_dict()) == recipe


# --- round trips ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(RECIPES)
def test_a_recipe_reads_back_from_its_dict(given_recipe: dict[str, Any]) -> None:
    before = copy.deepcopy(given_recipe)
    recipe = Recipe.parse(given_recipe)
    assert given_recipe == before
    written = recipe.to_dict()
    assert Recipe.parse(json.loads(json.dumps(written))) == recipe
    assert Recipe.parse(written).to_dict() == written
    assert Recipe.parse(recipe) is recipe


@settings(deadline=None, max_examples=40)
@given(RECIPES)
def test_a_recipe_and_its_dict_plan_the_same(given_recipe: dict[str, Any]) -> None:
    recipe = Recipe.parse(given_recipe)
    try:
        expected = specs(given_recipe)
    except RecipeError as error:
        with pytest.raises(RecipeError) as raised:
            specs(recipe.to_dict())
        assert str(raised.value) == str(error)
        return
    assert specs(recipe.to_dict()) == expected
