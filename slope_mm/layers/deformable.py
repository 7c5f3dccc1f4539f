"""mmcv's operators with compressed weights. Imported when a model has one (see ``kinds``).

The layers that find where a deformable convolution samples stay dense and get their input as it is:
a small error there moves every sample.
"""

from __future__ import annotations

from typing import Any

from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    MaskedConv2d,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from torch import Tensor, nn

from slope_mm.layers.activation import first_input
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.fake_quantize import StockFakeQuantize
from slope_mm.layers.kinds import register
from slope_mm.layers.substitution import CompressedOperator


class KnownOffsets:
    """Stands for a layer whose output is known."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, x: Tensor) -> Tensor:
        return self.output


class PackFakeQuantize(StockFakeQuantize):
    """Hooks of a convolution with its offsets that quantize its input, but not that of these."""

    def register(self, module: nn.Module) -> None:
        super().register(module)
        module.register_forward_hook(self.after, always_call=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        offsets: Any = module.conv_offset
        module.__dict__['conv_offset'] = KnownOffsets(offsets(first_input(args, kwargs)))
        return super().__call__(module, args, kwargs)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Behind the convolution's forward."""
        module.__dict__.pop('conv_offset', None)


class CompressedPack(CompressedOperator):
    """The forward of compressed deformable convolutions that find their offsets themselves."""

    baked_hook = PackFakeQuantize

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.slope_spec.activation_bits is None:
            return super().forward(input, *args, **kwargs)
        offsets: Any = self.conv_offset
        self.__dict__['conv_offset'] = KnownOffsets(offsets(input))
        try:
            return super().forward(input, *args, **kwargs)
        finally:
            del self.__dict__['conv_offset']


class SlopeDeformConv2d(CompressedOperator, DeformConv2d):
    """``DeformConv2d`` with a compressed weight and input."""


class SlopeDeformConv2dPack(CompressedPack, DeformConv2dPack):
    """``DeformConv2dPack`` with a compressed weight and input."""


class SlopeModulatedDeformConv2d(CompressedOperator, ModulatedDeformConv2d):
    """``ModulatedDeformConv2d`` with a compressed weight and input."""


class SlopeModulatedDeformConv2dPack(CompressedPack, ModulatedDeformConv2dPack):
    """``ModulatedDeformConv2dPack`` with a compressed weight and input."""


class SlopeMaskedConv2d(CompressedOperator, MaskedConv2d):
    """``MaskedConv2d`` with a compressed weight and input."""


KINDS: dict[type[nn.Module], type[CompressedLayer]] = {
    DeformConv2d: SlopeDeformConv2d,
    DeformConv2dPack: SlopeDeformConv2dPack,
    ModulatedDeformConv2d: SlopeModulatedDeformConv2d,
    ModulatedDeformConv2dPack: SlopeModulatedDeformConv2dPack,
    MaskedConv2d: SlopeMaskedConv2d,
}
register(KINDS)
