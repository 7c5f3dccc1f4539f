"""The multiple-choice knapsack: one candidate a layer, least total error, within the limits.

    minimize   sum_l sum_c error[l][c] x[l][c]
    such that  sum_c x[l][c] = 1 for every layer l,
               sum_l sum_c cost[l][c] x[l][c] <= limit for every resource,   x in {0, 1}

Solved to optimality by HiGHS (``scipy.optimize.milp``), which mmdet's SciPy brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from slope_mm.errors import ConfigError

# Coefficients are scaled to this, so that the solver's absolute tolerances (1e-6) mean nothing.
_SCALE = 1e6
_INFEASIBLE = 2


@dataclass(frozen=True)
class Resource:
    """Something of which there is only so much.

    Attributes:
        name: How messages call it, with its unit.
        costs: ``costs[layer][candidate]``, not negative.
        limit: What all layers together may take.
        fixed: What is taken whatever is chosen; messages add it, ``limit`` is without it.
    """

    name: str
    costs: Sequence[Sequence[float]]
    limit: float
    fixed: float = 0.0

    @property
    def smallest(self) -> float:
        """The least that a choice takes, without ``fixed``."""
        return sum(min(row) for row in self.costs)

    @property
    def largest(self) -> float:
        """The most."""
        return sum(max(row) for row in self.costs)

    def used(self, chosen: Sequence[int]) -> float:
        """What a choice takes, without ``fixed``."""
        return sum(row[index] for row, index in zip(self.costs, chosen, strict=True))


def allocate(errors: Sequence[Sequence[float]], resources: Sequence[Resource]) -> list[int]:
    """Chooses one candidate for every layer.

    Args:
        errors: ``errors[layer][candidate]``, finite.
        resources: What is limited.

    Returns:
        For every layer the index of its candidate.

    Raises:
        ConfigError: If a budget cannot be met; it tells the smallest and the largest that can.
    """
    for resource in resources:
        if resource.smallest > resource.limit:
            raise ConfigError(_impossible(resource))
    lengths = [len(row) for row in errors]
    starts = np.cumsum([0, *lengths])
    one_each = np.zeros((len(errors), starts[-1]))
    for layer, length in enumerate(lengths):
        one_each[layer, starts[layer] : starts[layer] + length] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for resource in resources:
        costs = np.concatenate([np.asarray(row, float) for row in resource.costs])
        scale = _SCALE / max(float(costs.max()), 1e-300)
        constraints.append(LinearConstraint(costs[None] * scale, -np.inf, resource.limit * scale))
    objective = np.concatenate([np.asarray(row, float) for row in errors])
    found = milp(
        objective * (_SCALE / max(float(np.abs(objective).max()), 1e-300)),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={'mip_rel_gap': 0.0, 'presolve': False},
    )
    if found.status == _INFEASIBLE:
        raise ConfigError(
            'each budget can be met alone, but not '
            + ' and '.join(f'{r.limit + r.fixed:,.0f} {r.name}' for r in resources)
            + ' together; raise one of them'
        )
    if found.x is None:
        raise ConfigError(f'the integer program was not solved: {found.message}')
    return [
        int(np.argmax(found.x[start : start + length]))
        for start, length in zip(starts, lengths, strict=False)
    ]


def _impossible(resource: Resource) -> str:
    low, high, limit = (
        value + resource.fixed for value in (resource.smallest, resource.largest, resource.limit)
    )
    return (
        f'a budget of {limit:,.0f} {resource.name} cannot be met: with these patterns and bits the'
        f' smallest is {low:,.0f}, the largest {high:,.0f}; raise it, or allow fewer bits or'
        ' sparser patterns'
    )
