"""What the tests of compressed layers share: a stock layer of each kind, and recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from mmcv.ops import MaskedConv2d
from mmdet.models.layers import NormedConv2d, NormedLinear
from torch import Tensor, nn

import slope_mm
from slope_mm.layers import CompressedLayer
from slope_mm.ops import nm_mask

W4 = dict(weight=dict(sparsity='2:4', bits=4))
W4A4 = dict(**W4, activation=dict(bits=4))
DENSE_W4 = dict(weight=dict(bits=4))
Recipe = dict[str, Any]

# A stock layer of each kind and an input for it.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'conv': (lambda: nn.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    'linear': (lambda: nn.Linear(8, 6), (5, 8)),
    'transposed conv': (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), (2, 8, 5, 5)),
    'mmcv conv': (lambda: wrappers.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    'mmcv linear': (lambda: wrappers.Linear(8, 6), (5, 8)),
    'mmcv transposed conv': (lambda: wrappers.ConvTranspose2d(8, 6, 2), (2, 8, 5, 5)),
    'conv of one axis': (lambda: nn.Conv1d(8, 6, 3), (2, 8, 7)),
    'conv of three axes': (lambda: nn.Conv3d(8, 6, 3), (2, 8, 4, 5, 4)),
    'mmcv conv of three axes': (lambda: wrappers.Conv3d(8, 6, 2), (2, 8, 4, 3, 4)),
    'transposed conv of one axis': (lambda: nn.ConvTranspose1d(8, 6, 3), (2, 8, 5)),
    'transposed conv of three axes': (lambda: nn.ConvTranspose3d(8, 6, 2), (2, 8, 3, 3, 3)),
    'mmcv transposed conv of three axes': (
        lambda: wrappers.ConvTranspose3d(8, 6, 2),
        (2, 8, 3, 3, 3),
    ),
    'adaptive padding': (lambda: Conv2dAdaptivePadding(8, 6, 3, stride=2), (2, 8, 7, 6)),
    'masked conv': (lambda: MaskedConv2d(8, 6, 3), (2, 8, 5, 5)),
    'normed linear': (lambda: NormedLinear(8, 6), (5, 8)),
    'normed conv': (lambda: NormedConv2d(8, 6, 3), (2, 8, 5, 5)),
    'conv normed over its kernel': (
        lambda: NormedConv2d(8, 6, 1, norm_over_kernel=True),
        (2, 8, 5, 5),
    ),
}
any_kind = pytest.mark.parametrize('kind', KINDS)


def stock_layer(kind: str) -> nn.Module:
    return KINDS[kind][0]()


def input_for(kind: str) -> Tensor:
    return torch.randn(KINDS[kind][1])


def compress(module: nn.Module, recipe: Recipe = W4) -> Any:
    return slope_mm.convert(module, recipe)


def compress_slowly(layer: CompressedLayer) -> Tensor:
    """The LSQ formula at 4 bits on the layer's own step and the weight's 2:4 mask."""
    assert layer.slope_step is not None
    mask = nm_mask(layer.weight, 2, 4, layer.input_axis)
    return (layer.weight / layer.slope_step).round().clamp(-8, 7) * layer.slope_step * mask
