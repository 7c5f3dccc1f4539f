"""What a compressed convolution, linear layer or transposed convolution is. Knows ops."""

from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import Composite, Projection
from slope_mm.layers.find import FoundWeight, find_weights
from slope_mm.layers.kinds import (
    COMPOSITE_KINDS,
    LAYER_KINDS,
    STOCK_KINDS,
    SlopeConv2d,
    SlopeConvTranspose2d,
    SlopeLinear,
    SlopeMMCVConv2d,
    SlopeMMCVConvTranspose2d,
    SlopeMMCVLinear,
    composite_kind,
    is_plain,
    layer_kind,
    stock_type,
)
from slope_mm.layers.sharing import shared_weights
from slope_mm.layers.spec import LayerSpec

__all__ = [
    'COMPOSITE_KINDS',
    'LAYER_KINDS',
    'STOCK_KINDS',
    'Composite',
    'CompressedLayer',
    'FoundWeight',
    'LayerSpec',
    'Projection',
    'SlopeConv2d',
    'SlopeConvTranspose2d',
    'SlopeLinear',
    'SlopeMMCVConv2d',
    'SlopeMMCVConvTranspose2d',
    'SlopeMMCVLinear',
    'composite_kind',
    'find_weights',
    'is_plain',
    'layer_kind',
    'shared_weights',
    'stock_type',
]
