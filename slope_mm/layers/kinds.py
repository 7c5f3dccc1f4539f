"""The kinds of layers that can be compressed, and the one table that lists them.

Each class is a mixin and its stock class, side by side: mmengine's initialisers match a module by
its class name or the names of its direct bases, so ``Conv2d`` has to be one of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from slope_mm.errors import SlopeError
from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.attention import SlopeMultiheadAttention, SlopeTransformerEncoderLayer
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import Composite
from slope_mm.layers.standardized import SlopeConvAWS2d, SlopeConvWS2d
from slope_mm.layers.substitution import CompressedOperator, as_parameter


class CompressedConv(CompressedLayer):
    """The forward of compressed convolutions."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The point where both nn.Conv2d.forward and mmengine's efficient_conv_bn_eval meet.
        if weight is not self.weight and 'weight' not in self._parameters:
            # A parametrization computes it at each look.
            raise SlopeError(
                'a parametrization (weight_norm, spectral_norm) was registered on the weight of a'
                ' compressed convolution; register it before the model is converted, which leaves'
                ' such a layer alone'
            )
        if weight is not self.weight:
            raise SlopeError(
                "a compressed convolution was called with a weight other than its own: mmengine's"
                ' efficient_conv_bn_eval scales weights before they could be compressed; remove'
                ' efficient_conv_bn_eval from the config'
            )
        x, w = self.operand(input), self.compressed_weight()
        with kept_as_recipe(x, w):
            return super()._conv_forward(x, w, bias)  # type: ignore[misc]


class CompressedLinear(CompressedLayer):
    """The forward of compressed linear layers."""

    def forward(self, input: Tensor) -> Tensor:
        layer: nn.Linear = self  # type: ignore[assignment]
        x, w = self.operand(input), self.compressed_weight()
        with kept_as_recipe(x, w):
            return F.linear(x, as_parameter(w, layer.weight), layer.bias)


class CompressedConvTranspose(CompressedLayer):
    """The forward of compressed transposed convolutions; their input channels are axis 0."""

    input_axis = 0
    output_axis = 1

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: nn.ConvTranspose2d = self  # type: ignore[assignment]
        output_padding = layer._output_padding(
            input,
            output_size,
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.kernel_size,  # type: ignore[arg-type]
            2,
            layer.dilation,  # type: ignore[arg-type]
        )
        x, w = self.operand(input), self.compressed_weight()
        with kept_as_recipe(x, w):
            return F.conv_transpose2d(
                x,
                w,
                layer.bias,
                layer.stride,
                layer.padding,  # type: ignore[arg-type]
                output_padding,
                layer.groups,
                layer.dilation,
            )


class SlopeConv2d(CompressedConv, nn.Conv2d):
    """``nn.Conv2d`` with a compressed weight and input."""


class SlopeLinear(CompressedLinear, nn.Linear):
    """``nn.Linear`` with a compressed weight and input."""


class SlopeConvTranspose2d(CompressedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a compressed weight and input."""


class SlopeMMCVConv2d(CompressedConv, wrappers.Conv2d):
    """mmcv's ``Conv2d`` wrapper with a compressed weight and input."""


class SlopeMMCVLinear(CompressedLinear, wrappers.Linear):
    """mmcv's ``Linear`` wrapper with a compressed weight and input."""


class SlopeMMCVConvTranspose2d(CompressedConvTranspose, wrappers.ConvTranspose2d):
    """mmcv's ``ConvTranspose2d`` wrapper with a compressed weight and input."""


class CompressedTransposed(CompressedOperator):
    """The forward of other compressed transposed convolutions."""

    input_axis = 0
    output_axis = 1


class SlopeOutProjection(CompressedLinear, NonDynamicallyQuantizableLinear):
    """Attention's output projection with a compressed weight and input."""


class SlopeConv1d(CompressedConv, nn.Conv1d):
    """``nn.Conv1d`` with a compressed weight and input."""


class SlopeConv3d(CompressedConv, nn.Conv3d):
    """``nn.Conv3d`` with a compressed weight and input."""


class SlopeMMCVConv3d(CompressedConv, wrappers.Conv3d):
    """mmcv's ``Conv3d`` wrapper with a compressed weight and input."""


class SlopeConvTranspose1d(CompressedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a compressed weight and input."""


class SlopeConvTranspose3d(CompressedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a compressed weight and input."""


class SlopeMMCVConvTranspose3d(CompressedTransposed, wrappers.ConvTranspose3d):
    """mmcv's ``ConvTranspose3d`` wrapper with a compressed weight and input."""


class SlopeConv2dAdaptivePadding(CompressedOperator, Conv2dAdaptivePadding):
    """mmcv's ``Conv2dAdaptivePadding`` with a compressed weight and input."""


# The table to extend: a stock class, by exact type, and its compressed form.
LAYER_KINDS: dict[type[nn.Module], type[CompressedLayer]] = {
    nn.Conv2d: SlopeConv2d,
    nn.Linear: SlopeLinear,
    nn.ConvTranspose2d: SlopeConvTranspose2d,
    wrappers.Conv2d: SlopeMMCVConv2d,
    wrappers.Linear: SlopeMMCVLinear,
    wrappers.ConvTranspose2d: SlopeMMCVConvTranspose2d,
    NonDynamicallyQuantizableLinear: SlopeOutProjection,
    nn.Conv1d: SlopeConv1d,
    nn.Conv3d: SlopeConv3d,
    nn.ConvTranspose1d: SlopeConvTranspose1d,
    nn.ConvTranspose3d: SlopeConvTranspose3d,
    wrappers.Conv3d: SlopeMMCVConv3d,
    wrappers.ConvTranspose3d: SlopeMMCVConvTranspose3d,
    Conv2dAdaptivePadding: SlopeConv2dAdaptivePadding,
    ConvWS2d: SlopeConvWS2d,
    ConvAWS2d: SlopeConvAWS2d,
}
# Plain convolutions and linear layers: one call of their operator on their weight and bias.
PLAIN = (
    nn.Conv2d,
    nn.Linear,
    nn.ConvTranspose2d,
    wrappers.Conv2d,
    wrappers.Linear,
    wrappers.ConvTranspose2d,
)
# Modules that use weights without the forward of a layer that owns them.
COMPOSITE_KINDS: dict[type[nn.Module], type[Composite]] = {
    nn.MultiheadAttention: SlopeMultiheadAttention,
    nn.TransformerEncoderLayer: SlopeTransformerEncoderLayer,
}


STOCK_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    slope: stock for stock, slope in [*LAYER_KINDS.items(), *COMPOSITE_KINDS.items()]
}


# Packages whose layers are slow to import, or may be absent, and where their kinds are registered.
ELSEWHERE = {
    'mmcv.ops.': 'slope_mm.layers.deformable',
    'mmcv.ops.saconv': 'slope_mm.layers.switchable',
    'mmdet.': 'slope_mm.layers.detection',
}


def register(kinds: Mapping[type[nn.Module], type[CompressedLayer]]) -> None:
    """Adds rows to the table of layers."""
    LAYER_KINDS.update(kinds)
    STOCK_KINDS.update({slope: stock for stock, slope in kinds.items()})


def register_composites(kinds: Mapping[type[nn.Module], type[Composite]]) -> None:
    """Adds rows to the table of modules that use weights directly."""
    COMPOSITE_KINDS.update(kinds)
    STOCK_KINDS.update({slope: stock for stock, slope in kinds.items()})


def _look_elsewhere(stock: type[nn.Module]) -> None:
    for package, module in ELSEWHERE.items():
        if stock.__module__.startswith(package):
            importlib.import_module(module)


def layer_kind(stock: type[nn.Module]) -> type[CompressedLayer] | None:
    """The compressed form of a stock class; None where there is none."""
    _look_elsewhere(stock)
    return LAYER_KINDS.get(stock)


def composite_kind(stock: type[nn.Module]) -> type[Composite] | None:
    """The form of a stock class that uses weights directly; None for others."""
    _look_elsewhere(stock)
    return COMPOSITE_KINDS.get(stock)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is, or was before it was compressed, a plain convolution or linear layer."""
    return stock_type(module) in PLAIN


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was swapped."""
    return STOCK_KINDS.get(type(module), type(module))
