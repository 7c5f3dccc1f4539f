"""From a budget to an allocation whose packed file keeps it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from slope_mm.allocation.choices import Candidate, same, with_weight
from slope_mm.allocation.program import Resource, allocate
from slope_mm.allocation.rules import allocation_rules, with_rules
from slope_mm.analysis.bops import spec_bops
from slope_mm.convert import convert, plan
from slope_mm.errors import ConfigError
from slope_mm.packing.writer import pack
from slope_mm.recipe import Recipe

Choice = tuple[str | None, int]
# The coding whose lengths are fixed by shapes, patterns and bits; the default one is never longer.
FIXED_LENGTH = 'enumerative'
_ATTEMPTS = 8


@dataclass(frozen=True)
class Allocation:
    """What every free layer gets.

    Attributes:
        recipe: The recipe with the allocated rules.
        chosen: The choice of each layer.
        error: Sum of the layers' errors.
        file_bytes: Length of its packed file with codes and index of fixed length: what training
            does to the weights cannot make it longer.
        bops: Bit operations of the whole model, or 0 where none were counted.
    """

    recipe: Recipe
    chosen: dict[str, Choice]
    error: float
    file_bytes: int
    bops: float


class Budget:
    """All that a solution depends on, measured once.

    Args:
        model: The dense model.
        recipe: The recipe whose rules hold.
        candidates: What each free layer may get, from :func:`~.choices.candidates`.
        errors: What it costs, from :func:`~.sensitivity.sensitivities`.
        meta: What the packed file's header tells beside.
        macs: Multiply-accumulates by layer; empty where bit operations do not count.
        calibrate: Calibrates a compressed model's inputs before it is weighed.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        candidates: Mapping[str, Mapping[Choice, Candidate]],
        errors: Mapping[str, Mapping[Choice, float]],
        meta: Mapping[str, Any] | None = None,
        macs: Mapping[str, int] | None = None,
        calibrate: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.candidates, self.errors = candidates, errors
        self.meta, self.calibrate = dict(meta or {}), calibrate
        self._known: dict[tuple[Choice, ...], Allocation] = {}
        macs = dict(macs or {})
        # Under any choice: what is not free does not depend on it.
        choice = next(iter(next(iter(candidates.values()))))
        specs = {layer.name: layer.spec for layer in plan(model, with_weight(recipe, choice))}
        self.fixed_bops = sum(
            spec_bops(specs.get(name), count)
            for name, count in macs.items()
            if name not in candidates
        )

    def recipe_of(self, chosen: Mapping[str, Choice]) -> Recipe:
        """The recipe with the commonest choice as its own, and a rule for every other layer."""
        specs = {name: self.candidates[name][choice].spec for name, choice in chosen.items()}
        common = Counter((spec.pattern, spec.bits) for spec in specs.values()).most_common(1)[0][0]
        recipe = replace(
            self.recipe, weight=replace(self.recipe.weight, sparsity=common[0], bits=common[1])
        )
        planned = {layer.name: layer.spec for layer in plan(self.model, recipe)}
        others = {name: spec for name, spec in specs.items() if not same(spec, planned[name])}
        return with_rules(recipe, allocation_rules(others, recipe, planned))

    def file_bytes(self, recipe: Recipe, coding: str = FIXED_LENGTH) -> int:
        """Length of the packed file of the dense model under a recipe."""
        model: Any = convert(copy.deepcopy(self.model), recipe)
        model.slope_recipe = recipe
        if self.calibrate is not None:
            self.calibrate(model)
        return len(pack(model, self.meta, coding=coding))

    def uniform(self, choice: Choice) -> Allocation:
        """One choice for all free layers."""
        return self._allocation(dict.fromkeys(self.candidates, choice))

    def solve(self, size: float | None = None, bops: float | None = None) -> Allocation:
        """The allocation of least total error.

        Args:
            size: Bytes that the packed file may take; None for no limit.
            bops: Bit operations of the whole model; None for no limit.

        Raises:
            ConfigError: If a budget cannot be met.
        """
        resources = []
        if bops is not None:
            costs = self._costs(lambda candidate: candidate.bops)
            resources.append(
                Resource('bit operations', costs, bops - self.fixed_bops, self.fixed_bops)
            )
        if size is None:
            return self._allocation(self._solved(resources))
        costs = self._costs(lambda candidate: candidate.bits / 8)
        cheapest = self._allocation(self._cheapest())
        uniform = self.best_uniform(size, bops)
        tried = [cheapest] if uniform is None else [uniform[1], cheapest]
        # Header and everything that is not chosen: the file's length without the chosen weights.
        fixed, smallest = cheapest.file_bytes - sum(map(min, costs)), sum(map(min, costs))
        limit = size - fixed
        operations = math.inf if bops is None else bops

        def keeping() -> list[Allocation]:
            return [a for a in tried if a.file_bytes <= size and a.bops <= operations]

        fits: float | None = None
        too_long: float | None = None
        for _ in range(_ATTEMPTS):
            try:
                chosen = self._solved([*resources, Resource('bytes', costs, limit, fixed)])
            except ConfigError:
                # The lightest weights need not have the shortest header: one choice for all has
                # less to tell.
                tried += [self.uniform(choice) for choice in next(iter(self.errors.values()))]
                if keeping():
                    break
                fixed = min(a.file_bytes for a in tried) - smallest
                limit = size - fixed
                chosen = self._solved([*resources, Resource('bytes', costs, limit, fixed)])
            found = self._allocation(chosen)
            # Headers differ by what they have to tell of the layers: a limit that is right for one
            # allocation may be a few bytes off for the next.
            tried.append(found)
            if found.file_bytes <= size:
                fits = limit
            else:
                too_long = limit
            limit = limit + size - found.file_bytes
            if fits is not None and too_long is not None:
                limit = (fits + too_long) / 2
            limit = max(limit, smallest)
        kept = keeping()
        if not kept:
            last = min(tried, key=lambda a: max(a.file_bytes / size, a.bops / operations))
            raise ConfigError(
                f'no allocation was found that keeps a budget of {size:,.0f} bytes'
                + ('' if bops is None else f' and {bops:,.0f} bit operations')
                + f'; the nearest takes {last.file_bytes:,} bytes and {last.bops:,.0f} bit'
                ' operations: raise the budget'
            )
        # Of equals the one that was solved for last.
        return min(reversed(kept), key=lambda a: a.error)

    def best_uniform(
        self, size: float | None = None, bops: float | None = None
    ) -> tuple[Choice, Allocation] | None:
        """The choice of least total error that keeps the budget when all free layers get it."""
        choices = next(iter(self.errors.values())).keys()
        errors = {choice: sum(row[choice] for row in self.errors.values()) for choice in choices}
        for choice in sorted(errors, key=lambda each: errors[each]):
            weights = sum(options[choice].bits for options in self.candidates.values()) / 8
            if size is not None and weights > size:
                continue
            found = self.uniform(choice)
            too_long = size is not None and found.file_bytes > size
            if not too_long and (bops is None or found.bops <= bops):
                return choice, found
        return None

    def _cheapest(self) -> dict[str, Choice]:
        return {
            name: min(options, key=lambda choice: options[choice].bits)
            for name, options in self.candidates.items()
        }

    def _costs(self, cost: Callable[[Candidate], float]) -> list[list[float]]:
        return [[cost(c) for c in options.values()] for options in self.candidates.values()]

    def _solved(self, resources: Sequence[Resource]) -> dict[str, Choice]:
        errors = [
            [self.errors[name][choice] for choice in options]
            for name, options in self.candidates.items()
        ]
        picked = allocate(errors, resources)
        return {
            name: list(options)[index]
            for (name, options), index in zip(self.candidates.items(), picked, strict=True)
        }

    def _error(self, chosen: Mapping[str, Choice]) -> float:
        return sum(self.errors[name][choice] for name, choice in chosen.items())

    def _allocation(self, chosen: dict[str, Choice]) -> Allocation:
        key = tuple(chosen.values())
        if key not in self._known:
            recipe = self.recipe_of(chosen)
            bops = self.fixed_bops + sum(self.candidates[n][c].bops for n, c in chosen.items())
            self._known[key] = Allocation(
                recipe, chosen, self._error(chosen), self.file_bytes(recipe), bops
            )
        return self._known[key]
