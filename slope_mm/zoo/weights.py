"""How much of a model's matrix products and convolutions is compressed, and what is not and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from slope_mm.convert import compressed_layers, plan
from slope_mm.layers import find_weights
from slope_mm.layers.find import is_table


def weight_shares(dense: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """Counts the weights of all matrix products and convolutions, compressed and not.

    Every parameter of two and more dimensions counts, but for embeddings, position and bias tables,
    which are looked up or added.

    Args:
        dense: The stock model.
        compressed: Its compressed twin.

    Returns:
        ``weights``, their number; ``compressed`` and ``sparse``, shares of it; ``dense_left`` and
        ``not_sparse``, rows of reason, share and an example; ``tables``, what is not counted, by
        class.
    """
    of = {id(weight.weight): weight.name for weight in find_weights(dense) if not weight.obstacle}
    recipe = compressed.slope_recipe
    reasons = {p.name: p.reason for p in plan(dense, recipe)}  # type: ignore[arg-type]
    layers = compressed_layers(compressed)
    total = held = sparse = 0
    left: dict[str, list[Any]] = {}
    unsparse: dict[str, list[Any]] = {}
    tables: dict[str, int] = {}
    for key, parameter in dense.named_parameters():
        if parameter.dim() < 2:
            continue
        owner, _, own = key.rpartition('.')
        module = dense.get_submodule(owner)
        if is_table(module, own):
            kind = type(module).__name__
            tables[kind] = tables.get(kind, 0) + parameter.numel()
            continue
        total += parameter.numel()
        name = of.get(id(parameter), owner)
        layer = layers.get(name) if id(parameter) in of else None
        if layer is not None:
            held += parameter.numel()
            if layer.slope_spec.pattern is not None:
                sparse += parameter.numel()
                continue
        where = left if layer is None else unsparse
        reason = layer.slope_spec.note if layer is not None else reasons.get(name, '')
        reason = reason or f'{type(module).__name__}.{own}'
        row = where.setdefault(reason, [0, name])
        row[0] += parameter.numel()
    share = 1 / max(total, 1)

    def rows(found: dict[str, list[Any]]) -> list[list[Any]]:
        ordered = sorted(found.items(), key=lambda item: -item[1][0])
        return [[reason, round(count * share, 6), name] for reason, (count, name) in ordered]

    return {
        'weights': total,
        'compressed': round(held * share, 6),
        'sparse': round(sparse * share, 6),
        'dense_left': rows(left),
        'not_sparse': rows(unsparse),
        'tables': tables,
    }


def shared_names(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names that are one and the same module or stock parameter."""
    groups: dict[nn.Module, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(not key.startswith('slope_') for key in module._parameters):
            groups.setdefault(module, set()).add(name)
    tied: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.rpartition('.')[2].startswith('slope_'):
            tied.setdefault(id(parameter), set()).add(name)
    found = [*groups.values(), *tied.values()]
    return {frozenset(names) for names in found if len(names) > 1}
