"""Allocations against every assignment there is, weighed by writing the files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from nets import RECIPE, images, net

import slope_mm
from slope_mm import ConfigError, Recipe
from slope_mm.allocation.budget import Budget
from slope_mm.allocation.choices import candidates, same, weight_choices
from slope_mm.allocation.sensitivity import sensitivities
from slope_mm.analysis.bops import count_operations, macs_by_layer

CHOICES = weight_choices([None, '2:4'], [2, 4])
# Headers tell more of layers that differ from the others.
HEADER = 400


@pytest.fixture(scope='module')
def budget() -> Budget:
    model, x = net(), images()
    options = candidates(model, RECIPE, CHOICES, macs_by_layer(model, lambda: model(x)))
    errors = sensitivities(model, RECIPE, CHOICES, options, lambda dense: dense(x))
    return Budget(model, RECIPE, options, errors, macs=macs_by_layer(model, lambda: model(x)))


def written(recipe: Recipe, path: Path) -> int:
    model = slope_mm.convert(net(), recipe)
    model.slope_recipe = recipe
    slope_mm.save_packed(model, path, coding='enumerative')
    return path.stat().st_size


def test_the_file_keeps_the_budget_and_nothing_clearly_lighter_is_better(
    budget: Budget, tmp_path: Path
) -> None:
    names = list(budget.candidates)
    everything = []
    for chosen in itertools.product(CHOICES, repeat=len(names)):
        assignment = dict(zip(names, chosen, strict=True))
        bits = sum(budget.candidates[n][c].bits for n, c in assignment.items())
        error = sum(budget.errors[n][c] for n, c in assignment.items())
        everything.append((bits / 8, error))
    lightest, heaviest = min(everything)[0], max(everything)[0]
    fixed = written(budget.solve().recipe, tmp_path / 'best.slope') - budget_bytes(
        budget, budget.solve().chosen
    )
    for share in (0.2, 0.5, 0.8):
        size = fixed + lightest + HEADER + share * (heaviest - lightest)
        found = budget.solve(size=size)
        assert written(found.recipe, tmp_path / 'found.slope') == found.file_bytes <= size
        rivals = [error for bytes_, error in everything if bytes_ + fixed + HEADER <= size]
        assert rivals and found.error <= min(rivals) * (1 + 1e-9)


@pytest.mark.parametrize('share', [0.2, 0.6])
def test_both_budgets_are_kept_where_the_lightest_file_is_not_the_fewest_operations(
    share: float,
) -> None:
    # An unstructured mask needs a bit a weight: at two bits it is longer than dense codes, and has
    # fewer operations.
    model, x = net(), images()
    choices = weight_choices([None, 'unstructured:0.7'], [2])
    macs = macs_by_layer(model, lambda: model(x))
    options = candidates(model, RECIPE, choices, macs)
    errors = sensitivities(model, RECIPE, choices, options)
    budget = Budget(model, RECIPE, options, errors, macs=macs)
    dense, masked = (budget.uniform(choice) for choice in choices)
    assert dense.file_bytes < masked.file_bytes and dense.error < masked.error
    size = masked.file_bytes + HEADER
    operations = masked.bops + share * (dense.bops - masked.bops)
    found = budget.solve(size=size, bops=operations)
    assert found.file_bytes <= size and found.bops <= operations
    with pytest.raises(ConfigError, match='bit operations'):
        budget.solve(size=dense.file_bytes, bops=masked.bops)


def budget_bytes(budget: Budget, chosen: dict[str, tuple[str | None, int]]) -> float:
    return sum(budget.candidates[n][c].bits for n, c in chosen.items()) / 8


def test_the_recipe_means_what_was_chosen(budget: Budget) -> None:
    found = budget.solve(size=3900)
    specs = {plan.name: plan.spec for plan in slope_mm.plan(net(), found.recipe)}
    for name, choice in found.chosen.items():
        assert same(specs[name], budget.candidates[name][choice].spec)
    fixed = {plan.name: plan.spec for plan in slope_mm.plan(net(), RECIPE)}
    for name in specs.keys() - found.chosen.keys():
        assert specs[name] == fixed[name]


def test_operations_are_those_of_the_converted_model(budget: Budget) -> None:
    x = images()
    everything = budget.solve()
    found = budget.solve(bops=everything.bops * 0.6)
    model = slope_mm.convert(net(), found.recipe)
    assert found.bops == count_operations(model, lambda: model(x)).bops <= everything.bops * 0.6
    both = budget.solve(size=3900, bops=everything.bops * 0.6)
    assert both.error >= found.error
    assert both.file_bytes <= 3900


def test_an_impossible_size_tells_what_can_be_reached(budget: Budget, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='cannot be met') as refused:
        budget.solve(size=100)
    smallest = int(str(refused.value).split('smallest is ')[1].split(' the')[0].replace(',', ''))
    found = budget.solve(size=smallest)
    assert written(found.recipe, tmp_path / 'smallest.slope') <= smallest
    with pytest.raises(ConfigError, match='cannot be met'):
        budget.solve(size=smallest - 1)


@pytest.mark.parametrize('choice', CHOICES, ids=str)
def test_what_one_choice_for_all_takes_is_a_budget_that_can_be_met(
    budget: Budget, choice: tuple[str | None, int]
) -> None:
    """Also where the lightest weights of all come with a longer header than its own."""
    uniform = budget.uniform(choice)
    for limits in ({}, {'bops': uniform.bops}):
        found = budget.solve(size=uniform.file_bytes, **limits)
        assert found.file_bytes <= uniform.file_bytes
        assert found.bops <= limits.get('bops', found.bops)
        assert found.error <= uniform.error


def test_the_best_uniform_choice_is_never_better(budget: Budget) -> None:
    for size in (3700, 3900, 4100):
        uniform = budget.best_uniform(size=size)
        found = budget.solve(size=size)
        assert uniform is not None and uniform[1].file_bytes <= size
        assert found.error <= uniform[1].error
    assert budget.best_uniform(size=100) is None
