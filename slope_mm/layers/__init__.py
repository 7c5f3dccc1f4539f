"""What a compressed convolution, linear layer or transposed convolution is. Knows ops."""

from slope_mm.layers.base import CompressedLayer, shared_weights
from slope_mm.layers.kinds import (
    LAYER_KINDS,
    STOCK_KINDS,
    SlopeConv2d,
    SlopeConvTranspose2d,
    SlopeLinear,
    SlopeMMCVConv2d,
    SlopeMMCVConvTranspose2d,
    SlopeMMCVLinear,
    stock_type,
)
from slope_mm.layers.spec import LayerSpec

__all__ = [
    'LAYER_KINDS',
    'STOCK_KINDS',
    'CompressedLayer',
    'LayerSpec',
    'SlopeConv2d',
    'SlopeConvTranspose2d',
    'SlopeLinear',
    'SlopeMMCVConv2d',
    'SlopeMMCVConvTranspose2d',
    'SlopeMMCVLinear',
    'shared_weights',
    'stock_type',
]
