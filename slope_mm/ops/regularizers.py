"""Regularizers: how far the compressed weight is from its latent weight, as a loss.

Each is a function of three sums over an item, ``w·w``, ``w·ŵ`` and ``ŵ·ŵ``: an item is a layer or
an output filter. The mean over all items of a model is L_reg.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    precise = [layer.double() for layer in powers]
    if granularity == 'layer':
        precise = [layer.sum(1, keepdim=True) for layer in precise]
    return REGULARIZERS[name](torch.cat(precise, 1)).float()


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
