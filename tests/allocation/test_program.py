"""The integer program against trying every assignment."""

from __future__ import annotations

import itertools
import random

import pytest

from slope_mm import ConfigError
from slope_mm.allocation.program import Resource, allocate


def brute_force(errors: list[list[float]], resources: list[Resource]) -> float | None:
    """The least total error among all assignments within the limits."""
    found = [
        sum(row[i] for row, i in zip(errors, chosen, strict=True))
        for chosen in itertools.product(*(range(len(row)) for row in errors))
        if all(
            sum(row[i] for row, i in zip(r.costs, chosen, strict=True)) <= r.limit
            for r in resources
        )
    ]
    return min(found, default=None)


def instance(seed: int, limits: int) -> tuple[list[list[float]], list[Resource]]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 4) for _ in range(draw.randint(1, 6))]
    scale = 10 ** draw.uniform(-6, 1)
    errors = [[draw.random() * scale for _ in range(n)] for n in lengths]
    resources = []
    for index in range(limits):
        # Bytes are whole numbers, bit operations large ones.
        size = [10**3, 10**10][index]
        costs = [[draw.randint(1, size) for _ in range(n)] for n in lengths]
        low, high = sum(map(min, costs)), sum(map(max, costs))
        resources.append(Resource('units', costs, draw.randint(low, high)))
    return errors, resources


@pytest.mark.parametrize('limits', [1, 2])
def test_no_assignment_is_better(limits: int) -> None:
    solved = 0
    for seed in range(60):
        errors, resources = instance(seed, limits)
        best = brute_force(errors, resources)
        if best is None:
            # Each limit can be met, both together cannot.
            with pytest.raises(ConfigError, match='together'):
                allocate(errors, resources)
            continue
        chosen = allocate(errors, resources)
        for resource in resources:
            assert resource.used(chosen) <= resource.limit
        total = sum(row[i] for row, i in zip(errors, chosen, strict=True))
        assert total == pytest.approx(best, rel=1e-9)
        solved += 1
    assert solved > 30


def test_without_limits_every_layer_gets_its_best() -> None:
    assert allocate([[3.0, 1.0, 2.0], [0.5, 0.7]], []) == [1, 0]


def test_a_budget_to_the_unit_is_met() -> None:
    costs = [[8_000_001, 4_000_000], [9_000_000, 3_000_001]]
    errors = [[0.0, 1.0], [0.0, 1.1]]
    assert allocate(errors, [Resource('bytes', costs, 13_000_000)]) == [1, 0]
    assert allocate(errors, [Resource('bytes', costs, 12_999_999)]) == [0, 1]


def test_an_impossible_budget_tells_the_range() -> None:
    resource = Resource('bytes', [[10, 20], [30, 45]], 39, fixed=1000)
    with pytest.raises(ConfigError) as refused:
        allocate([[1, 0], [1, 0]], [resource])
    for figure in ('1,039', '1,040', '1,065'):
        assert figure in str(refused.value)
