"""Regularizers: how far the compressed weight is from its latent weight, as a loss.

Each is a function of three sums over an item, ``w·w``, ``w·ŵ`` and ``ŵ·ŵ``: an item is a layer or
an output filter. The mean over all items of a model is L_reg.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.errors import RecipeError, nearest

GRANULARITIES = ('layer', 'filter')
_TINY = 1e-60


def power_sums(w: Tensor, compressed: Tensor, output_axis: int = 0) -> Tensor:
    """``w·w``, ``w·ŵ`` and ``ŵ·ŵ`` per output filter, differentiable in both.

    Args:
        w: Latent weight.
        compressed: Compressed weight of the same shape.
        output_axis: The filter axis: 0, or 1 for transposed convolutions.

    Returns:
        fp32 of shape ``[3, filters]``.
    """
    a, b = (
        x.float().movedim(output_axis, 0).reshape(x.shape[output_axis], -1) for x in (w, compressed)
    )
    return torch.stack([(a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])


def _cosine_distance(powers: Tensor) -> Tensor:
    latent, product, compressed = powers
    # The lower bound keeps sqrt's infinite slope at zero out of the gradient.
    norms = latent.clamp_min(_TINY).sqrt() * compressed.clamp_min(_TINY).sqrt()
    cosine = torch.where(compressed > 0, product / norms, torch.zeros_like(norms))
    return torch.where(latent > 0, 1 - cosine, torch.zeros_like(cosine))


def _relative_l2(powers: Tensor) -> Tensor:
    latent, product, compressed = powers
    ratio = (latent - 2 * product + compressed) / latent.clamp_min(_TINY)
    return torch.where(latent > 0, ratio, torch.zeros_like(ratio))


def _nothing(powers: Tensor) -> Tensor:
    return torch.zeros_like(powers[0].detach())


# The table to extend: a function of the sums ``[3, items]`` in fp64, one value per item.
REGULARIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    'cosine': _cosine_distance,
    'l2': _relative_l2,
    'none': _nothing,
}


def regularize(name: str, powers: Sequence[Tensor], granularity: str = 'layer') -> Tensor:
    """One value per regularized item of one or more layers.

    Differences of nearly equal sums decide at 8 bits, so layers are added up and compared in fp64.

    Args:
        name: ``'cosine'``, ``'l2'`` or ``'none'``.
        powers: For each layer what :func:`power_sums` or
            :func:`~slope_mm.ops.compress_with_powers` says of it.
        granularity: ``'layer'`` or ``'filter'``.

    Returns:
        fp32: one value a layer, or one an output filter, in the layers' order.

    Raises:
        RecipeError: If the name or the granularity is unknown.
    """
    check_regularizer(name, granularity)
    if granularity == 'layer' and len(powers) == 1:
        rows = powers[0].sum(1, keepdim=True, dtype=torch.float64)
    else:
        rows = _joined(powers)
        if granularity == 'layer':
            counts = tuple(layer.shape[1] for layer in powers)
            rows = _SumByLayer.apply(rows, counts)
    return REGULARIZERS[name](rows).float()


def _joined(powers: Sequence[Tensor]) -> Tensor:
    """All layers' sums beside each other, in fp64."""
    return (powers[0] if len(powers) == 1 else torch.cat(tuple(powers), 1)).double()


# Values that are added up at once.
_PIECE = 256


@functools.lru_cache(64)
def _places(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sums by layer find their terms; a place behind the last one holds a zero.

    Returns:
        ``(pieces, layers, owner)``: the rows of each piece, ``[pieces, 256]``; the pieces of each
        layer, ``[layers, ...]``; and the layer of each row.
    """
    total, first = sum(counts), 0
    pieces: list[Tensor] = []
    layers: list[list[int]] = []
    for count in counts:
        starts = range(first, first + count, _PIECE)
        layers.append([len(pieces) + i for i in range(len(starts))])
        pieces += [torch.arange(start, min(start + _PIECE, first + count)) for start in starts]
        first += count
    with torch.inference_mode(False):
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        by_piece = [nn.functional.pad(p, (0, _PIECE - len(p)), value=total) for p in pieces]
        widest = max(map(len, layers))
        by_layer = [own + [len(pieces)] * (widest - len(own)) for own in layers]
        found = torch.stack(by_piece), torch.tensor(by_layer), owner
        return tuple(index.to(device) for index in found)  # type: ignore[return-value]


class _SumByLayer(torch.autograd.Function):
    """Sums over each layer's rows, for all layers at once: few kernels, however many layers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.places = pieces, layers, _ = _places(counts, rows.device)
        sums = nn.functional.pad(rows, (0, 1))[:, pieces].sum(2)
        return nn.functional.pad(sums, (0, 1))[:, layers].sum(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(1, ctx.places[2]), None


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
    return regularize('cosine', [power_sums(w, compressed, output_axis)], granularity)


def relative_l2(
    w: Tensor, compressed: Tensor, granularity: str = 'layer', output_axis: int = 0
) -> Tensor:
    """``|w - compressed|^2 / |w|^2``, differentiable in both; 0 for a latent weight of zero.

    The relative form is this project's normalisation of the paper's L2 arm, so that one lambda
    means the same in every layer. Arguments and result as in :func:`cosine_distance`.
    """
    return regularize('l2', [power_sums(w, compressed, output_axis)], granularity)


def check_regularizer(name: str, granularity: str = 'layer') -> None:
    """Refuses what is no regularizer.

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
