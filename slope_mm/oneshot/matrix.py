"""A layer as matrix products: its weight and its input, unfolded, with N:M groups side by side.

Column ``(k, c)`` of both stands for input channel ``c`` at kernel position ``k``; ``c`` runs
fastest, so that an N:M group (consecutive input channels at one kernel position) is ``M``
consecutive columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn

from slope_mm.layers import CompressedLayer, stock_type

CONVOLUTIONS = (nn.Conv2d, wrappers.Conv2d)
TRANSPOSED = (nn.ConvTranspose2d, wrappers.ConvTranspose2d)
LINEAR = (nn.Linear, wrappers.Linear)
# Unfolded values that are in memory at once.
_PIECE = 2**24


def is_product(layer: nn.Module) -> bool:
    """Whether a layer is one of the kinds that this module can unfold."""
    return stock_type(layer) in (*CONVOLUTIONS, *TRANSPOSED, *LINEAR)


def weight_matrix(layer: CompressedLayer, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as ``[groups, rows, columns]``.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        weight: Its weight, its mask, or anything else of that shape.
    """
    groups = getattr(layer, 'groups', 1)
    if stock_type(layer) in LINEAR:
        return weight.unsqueeze(0)
    if stock_type(layer) in TRANSPOSED:
        channels, rows, height, width = weight.shape
        split = weight.reshape(groups, channels // groups, rows, height, width)
        return split.permute(0, 2, 3, 4, 1).reshape(groups, rows, -1)
    rows, channels, height, width = weight.shape
    split = weight.reshape(groups, rows // groups, channels, height, width)
    return split.permute(0, 1, 3, 4, 2).reshape(groups, rows // groups, -1)


def from_matrix(layer: CompressedLayer, matrix: Tensor) -> Tensor:
    """The inverse of :func:`weight_matrix`."""
    shape = layer.weight.shape
    groups = getattr(layer, 'groups', 1)
    if stock_type(layer) in LINEAR:
        return matrix.squeeze(0)
    if stock_type(layer) in TRANSPOSED:
        channels, rows, height, width = shape
        split = matrix.reshape(groups, rows, height, width, channels // groups)
        return split.permute(0, 4, 1, 2, 3).reshape(shape)
    rows, channels, height, width = shape
    split = matrix.reshape(groups, rows // groups, height, width, channels)
    return split.permute(0, 1, 4, 2, 3).reshape(shape)


def unfolded_inputs(layer: CompressedLayer, x: Tensor, limit: int) -> Iterator[Tensor]:
    """A layer's input as the rows that its weight matrix is multiplied with, a piece at a time.

    ``weight_matrix @ piece^T`` gives the layer's outputs (without bias) at the piece's positions.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        x: Its input, quantized already where the layer quantizes.
        limit: At most about so many positions, evenly spread, where there are more.

    Yields:
        ``[groups, positions, columns]``.
    """
    if stock_type(layer) in LINEAR:
        rows = x.reshape(-1, x.shape[-1])
        yield rows[:: _stride(rows.shape[0], limit)].unsqueeze(0)
        return
    groups = getattr(layer, 'groups', 1)
    padded, options = _padded(layer, x)
    kernel = math.prod(options['kernel_size'])
    positions = _positions(padded, options)
    stride = _stride(positions * x.shape[0], limit)
    images = max(1, _PIECE // max(1, positions * x.shape[1] * kernel))
    for piece in padded.split(images):
        columns = F.unfold(piece, **options)
        if stock_type(layer) in TRANSPOSED:
            # A transposed convolution is a convolution with the kernel turned round.
            columns = columns.reshape(*_split(columns, kernel)).flip(2).reshape(columns.shape)
        split = columns.reshape(len(piece), groups, -1, kernel, columns.shape[-1])
        rows = split.permute(1, 0, 4, 3, 2).reshape(groups, -1, kernel * split.shape[2])
        yield rows[:, ::stride]


def _split(columns: Tensor, kernel: int) -> tuple[int, int, int, int]:
    return columns.shape[0], columns.shape[1] // kernel, kernel, columns.shape[2]


def _stride(count: int, limit: int) -> int:
    """Odd, so that it does not run along one column of the feature map."""
    return 1 if count <= limit else max(1, count // limit) | 1


def _positions(padded: Tensor, options: dict[str, tuple[int, int]]) -> int:
    sizes = [
        (padded.shape[2 + i] - options['dilation'][i] * (options['kernel_size'][i] - 1) - 1)
        // options['stride'][i]
        + 1
        for i in range(2)
    ]
    return math.prod(sizes)


def _padded(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """The input with its border, and what unfolds it from there."""
    conv: nn.Conv2d = layer  # type: ignore[assignment]
    kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
    stride = _pair(conv.stride)
    options = {'kernel_size': kernel, 'dilation': dilation, 'stride': stride}
    if stock_type(layer) not in TRANSPOSED:
        mode = 'constant' if conv.padding_mode == 'zeros' else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), options
    # Zeros between the inputs, and the border of a full convolution less the padding.
    height, width = x.shape[-2:]
    spread = x.new_zeros(*x.shape[:2], (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    spread[..., :: stride[0], :: stride[1]] = x
    padding, extra = _pair(conv.padding), _pair(conv.output_padding)
    border = [dilation[i] * (kernel[i] - 1) - padding[i] for i in range(2)]
    spread = F.pad(spread, (border[1], border[1] + extra[1], border[0], border[0] + extra[0]))
    return spread, {**options, 'stride': (1, 1)}


def _pair(value: object) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    return (int(pair[0]), int(pair[1]))  # type: ignore[index]
