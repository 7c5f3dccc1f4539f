"""How much of a model's matrix products and convolutions is compressed, and what is not and why."""

from __future__ import annotations

from typing import Any

from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import nn
from torch.nn.modules.conv import _ConvNd

from slope_mm.convert import compressed_layers, plan
from slope_mm.layers import LAYER_KINDS

# Classes whose parameters of two and more dimensions multiply activations.
PRODUCTS = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    DeformConv2d,
    ModulatedDeformConv2d,
)


def is_product(module: nn.Module) -> bool:
    """Whether a stock layer's weight multiplies activations (and is no table that is looked up)."""
    return isinstance(module, PRODUCTS) or type(module) in LAYER_KINDS


def weight_shares(dense: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """Counts the weights of all matrix products and convolutions, compressed and not.

    Args:
        dense: The stock model.
        compressed: Its compressed twin.

    Returns:
        ``weights``, their number; ``compressed`` and ``sparse``, shares of it; ``dense_left`` and
        ``not_sparse``, rows of reason, share and an example; ``tables``, the parameters of two and
        more dimensions that are no products' weights, by class, with their number.
    """
    reasons = {p.name: p.reason for p in plan(dense, compressed.slope_recipe)}  # type: ignore[arg-type]
    layers = compressed_layers(compressed)
    total = compressed_weights = sparse = 0
    left: dict[str, list[Any]] = {}
    unsparse: dict[str, list[Any]] = {}
    tables: dict[str, int] = {}
    counted: set[int] = set()
    for name, module in dense.named_modules():
        stock = (p for p in module._parameters.values() if p is not None and p.dim() > 1)
        own = {id(p): p.numel() for p in stock}
        count = sum(numel for key, numel in own.items() if key not in counted)
        counted.update(own)
        if not count:
            continue
        if not is_product(module):
            kind = type(module).__name__
            tables[kind] = tables.get(kind, 0) + count
            continue
        total += count
        layer = layers.get(name)
        if layer is not None:
            compressed_weights += count
            if layer.slope_spec.pattern is not None:
                sparse += count
                continue
        where = left if layer is None else unsparse
        reason = reasons.get(name, '') if layer is None else layer.slope_spec.note
        entry = where.setdefault(reason, [0, name])
        entry[0] += count
    share = 1 / max(total, 1)

    def rows(found: dict[str, list[Any]]) -> list[list[Any]]:
        ordered = sorted(found.items(), key=lambda item: -item[1][0])
        return [[reason, round(count * share, 6), name] for reason, (count, name) in ordered]

    return {
        'weights': total,
        'compressed': round(compressed_weights * share, 6),
        'sparse': round(sparse * share, 6),
        'dense_left': rows(left),
        'not_sparse': rows(unsparse),
        'tables': tables,
    }


def shared_names(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names that are one and the same module with weights of its own."""
    groups: dict[nn.Module, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters:
            groups.setdefault(module, set()).add(name)
    tied: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.rpartition('.')[2].startswith('slope_'):
            tied.setdefault(id(parameter), set()).add(name)
    found = [*groups.values(), *tied.values()]
    return {frozenset(names) for names in found if len(names) > 1}
