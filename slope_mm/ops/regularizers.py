"""Regularizers: how far the compressed weight is from its latent weight, as a loss.

Each takes one layer's latent and compressed weight and returns one value per regularized item: a
single one by layer, one per output filter by filter. The mean over all items of a model is L_reg.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slope_mm.errors import RecipeError, nearest

GRANULARITIES = ('layer', 'filter')
_TINY = 1e-30


def _rows(x: Tensor, granularity: str, output_axis: int) -> Tensor:
    """fp32 view with one row per item."""
    x = x.float()
    if granularity == 'layer':
        return x.reshape(1, -1)
    return x.movedim(output_axis, 0).reshape(x.shape[output_axis], -1)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    # A dot product needs no temporary of weight size, unlike (a * b).sum().
    if a.shape[0] == 1:
        return torch.dot(a[0], b[0]).reshape(1)
    return torch.linalg.vecdot(a, b)


def cosine_distance(
    w: Tensor, compressed: Tensor, granularity: str = 'layer', output_axis: int = 0
) -> Tensor:
    """``1 - cos(w, compressed)`` (arXiv 2511.08360, eq. 5), differentiable in both.

    An item whose latent weight is zero is aligned with anything: 0, with zero gradient. A
    compressed weight of zero beside a latent one that is not gives 1, with zero gradient too: it
    has no direction that could be turned.

    Args:
        w: Latent weight.
        compressed: Compressed weight of the same shape.
        granularity: ``'layer'`` or ``'filter'``.
        output_axis: The filter axis: 0, or 1 for transposed convolutions.

    Returns:
        fp32, one value per item.
    """
    a = _rows(w, granularity, output_axis)
    b = _rows(compressed, granularity, output_axis)
    power_a, power_b = _row_dot(a, a), _row_dot(b, b)
    # Each norm apart: their product leaves fp32's range long before they do. The lower bound keeps
    # sqrt's infinite slope at zero out of the gradient.
    norms = power_a.clamp_min(_TINY).sqrt() * power_b.clamp_min(_TINY).sqrt()
    cosine = torch.where(power_b > 0, _row_dot(a, b) / norms, torch.zeros_like(norms))
    return torch.where(power_a > 0, 1 - cosine, torch.zeros_like(cosine))


def relative_l2(
    w: Tensor, compressed: Tensor, granularity: str = 'layer', output_axis: int = 0
) -> Tensor:
    """``|w - compressed|^2 / |w|^2``, differentiable in both; 0 for a latent weight of zero.

    The relative form is this project's normalisation of the paper's L2 arm, so that one lambda
    means the same in every layer. Arguments and result as in :func:`cosine_distance`.
    """
    a = _rows(w, granularity, output_axis)
    difference = a - _rows(compressed, granularity, output_axis)
    power = _row_dot(a, a)
    ratio = _row_dot(difference, difference) / power.clamp_min(_TINY)
    return torch.where(power > 0, ratio, torch.zeros_like(ratio))


def _nothing(
    w: Tensor, compressed: Tensor, granularity: str = 'layer', output_axis: int = 0
) -> Tensor:
    """Zero per item, without a graph: the naive arm."""
    items = 1 if granularity == 'layer' else w.shape[output_axis]
    return torch.zeros(items, device=w.device)


# The table to extend.
REGULARIZERS: dict[str, Callable[[Tensor, Tensor, str, int], Tensor]] = {
    'cosine': cosine_distance,
    'l2': relative_l2,
    'none': _nothing,
}


def get_regularizer(name: str, granularity: str = 'layer') -> Callable[..., Tensor]:
    """Looks a regularizer up.

    Raises:
        RecipeError: If the name or the granularity is unknown.
    """
    if not isinstance(name, str) or name not in REGULARIZERS:
        raise RecipeError(
            f'regularizer type={name!r} is unknown; choose one of {sorted(REGULARIZERS)}'
            f'{nearest(str(name), REGULARIZERS)}'
        )
    if granularity not in GRANULARITIES:
        raise RecipeError(
            f'regularizer granularity={granularity!r} is unknown; choose one of'
            f' {list(GRANULARITIES)}{nearest(str(granularity), GRANULARITIES)}'
        )
    return REGULARIZERS[name]
