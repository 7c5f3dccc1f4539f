"""What is free to choose, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import RECIPE, net
from torch import Tensor, nn

import slope_mm
from slope_mm import Recipe, RecipeError
from slope_mm.allocation.choices import candidates, fitting, weight_choices, with_weight
from slope_mm.allocation.sensitivity import sensitivities
from slope_mm.analysis.bops import macs_by_layer

CHOICES = weight_choices([None, '2:4', '2:8'], [2, 4])


def test_rules_keep_the_last_word() -> None:
    rules = [
        dict(match='fc', weight=dict(sparsity=None, bits=8)),
        dict(match='narrow', weight=dict(sparsity=None)),
        dict(match='odd', compress=False),
    ]
    recipe = Recipe.parse({**RECIPE.to_dict(), 'rules': rules})
    free = candidates(net(), recipe, CHOICES)
    # stem and fc_cls: default rules; fc and odd: decided above.
    assert free.keys() == {'wide', 'narrow'}
    assert {str(c.spec) for c in free['narrow'].values()} == {'dense W2 A32', 'dense W4 A32'}
    assert len({c.spec for c in free['wide'].values()}) == 6


def test_candidates_take_what_a_converted_layer_takes() -> None:
    model = net()
    macs = {'wide': 1000}
    for choice in CHOICES:
        candidate = candidates(model, RECIPE, CHOICES, macs)['wide'][choice]
        report = slope_mm.report(slope_mm.convert(net(), with_weight(RECIPE, choice)))
        row = next(row for row in report if row.name == 'wide')
        assert candidate.bits == row.stored_bits
        density = {None: 1, '2:4': 0.5, '2:8': 0.25}[choice[0]]
        assert candidate.bops == 1000 * density * choice[1] * 32


def test_a_layer_that_cannot_hold_a_pattern_is_dense_there() -> None:
    narrow = candidates(net(), RECIPE, CHOICES)['narrow']
    assert narrow['2:4', 2].spec.pattern is not None
    # 12 channels hold no 2:8.
    assert replace(narrow['2:8', 2].spec, note='') == narrow[None, 2].spec
    assert narrow['2:8', 2].bits == narrow[None, 2].bits


def test_patterns_that_no_layer_holds_are_left_out_or_named() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12))
    assert fitting(model, RECIPE) == [None, '2:4', '2:8']
    with pytest.raises(RecipeError, match="'2:16' is among the patterns to choose from"):
        candidates(model, RECIPE, weight_choices())
    assert set(candidates(model, RECIPE, weight_choices(fitting(model, RECIPE)))) == {'0', '1'}


@pytest.mark.parametrize(
    ('patterns', 'bits', 'words'),
    [(['4:2'], [2, 4], '4:2'), ([None], [9, 4], '9'), (['2:4'], [4], 'nothing to choose')],
)
def test_impossible_choices(patterns: list[str | None], bits: list[int], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        weight_choices(patterns, bits)


def test_a_recipe_that_decides_everything_is_refused() -> None:
    rule = dict(match='re:.*', weight=dict(sparsity='2:4', bits=5))
    recipe = Recipe.parse({**RECIPE.to_dict(), 'rules': [rule]})
    with pytest.raises(RecipeError, match='decide every layer'):
        candidates(net(), recipe, CHOICES)


def test_a_rule_that_leaves_a_layer_dense_or_sparse_by_choice_is_refused() -> None:
    # Full precision: under a dense choice nothing would be left to compress.
    rule = dict(match='wide', weight=dict(bits=None))
    recipe = Recipe.parse({**RECIPE.to_dict(), 'rules': [rule]})
    with pytest.raises(RecipeError, match="leaves 'wide' at full precision"):
        candidates(net(), recipe, CHOICES)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attend(x, x, x)[0])


def test_the_projections_of_attention_are_layers_of_their_own() -> None:
    model, x = Attending().eval(), torch.randn(1, 5, 16)
    macs = macs_by_layer(model, lambda: model(x))
    assert macs == {'attend.in_proj': 5 * 16 * 48, 'attend.out_proj': 5 * 256, 'last': 5 * 128}
    free = candidates(model, RECIPE, CHOICES, macs)
    assert free.keys() == macs.keys()
    twin = slope_mm.convert(Attending(), with_weight(RECIPE, ('2:4', 2)))
    stored = {row.name: row.stored_bits for row in slope_mm.report(twin)}
    errors = sensitivities(model, RECIPE, CHOICES, free, lambda dense: dense(x))
    for name, options in free.items():
        assert options['2:4', 2].bits == stored[name]
        assert options['2:4', 2].bops == macs[name] * 0.5 * 2 * 32
        # The inputs of in_proj and out_proj are seen by nobody: their weights are judged.
        assert 0 < errors[name][None, 4] < errors[name]['2:4', 2] < 1
