"""Rules that say all of a layer's spec, and catch that layer alone."""

from __future__ import annotations

import pytest
from nets import RECIPE
from torch import nn

import slope_mm
from slope_mm import Recipe
from slope_mm.allocation.rules import allocation_rules, with_rules


class Outer(nn.Linear):
    """A layer with another one inside."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 8)


@pytest.mark.parametrize('bits', [None, 8])
def test_what_another_rule_said_is_said_again(bits: int | None) -> None:
    rule = dict(
        match='0',
        weight=dict(codes='odd', step='tensor'),
        activation=None if bits is None else dict(bits=bits),
        gradient='masked',
    )
    base = Recipe.parse({**RECIPE.to_dict(), 'activation': dict(bits=4), 'rules': [rule]})
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wanted = {plan.name: plan.spec for plan in slope_mm.plan(model, base)}
    rules = allocation_rules(wanted, base, wanted)
    again = {plan.name: plan.spec for plan in slope_mm.plan(model, with_rules(base, rules))}
    assert again == wanted
    assert wanted['0'] != wanted['1']


def test_a_rule_for_a_layer_does_not_catch_what_is_inside() -> None:
    model = nn.Sequential(Outer())
    plain = {'0': slope_mm.plan(nn.Sequential(nn.Linear(8, 8)), RECIPE)[0].spec}
    rules = allocation_rules(plain, RECIPE, ['0', '0.inner'])
    names = [name for name, _ in model.named_modules() if name]
    matching = [name for name in names if with_rules(RECIPE, rules).rules[0].matches([name], [], 8)]
    assert matching == ['0']
