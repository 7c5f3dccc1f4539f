"""What is free to choose, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nets import RECIPE, net

import slope_mm
from slope_mm import Recipe, RecipeError
from slope_mm.allocation.choices import candidates, weight_choices, with_weight

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
