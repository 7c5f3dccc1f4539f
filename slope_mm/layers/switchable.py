"""DetectoRS' switchable atrous convolution: two weights of one layer, compressed after
standardization. Imported when a model has one (see ``kinds``).

The layer convolves with its standardized weight, and, three times as far, with the sum of that and
a learned difference. Both are compressed, as ``NAME.small`` and ``NAME.large``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from mmcv.ops.deform_conv import deform_conv2d
from mmcv.ops.saconv import SAConv2d
from torch import Tensor, nn

from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import BareWeight, Composite, Projection
from slope_mm.layers.fake_quantize import FakeQuantizer
from slope_mm.layers.kinds import register_composites
from slope_mm.layers.standardized import STANDARDIZED, StandardizedWeight


def small_weight(layer: nn.Module) -> Tensor:
    """The weight of a stock layer's narrower convolution."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return ConvAWS2d._get_weight(layer, weight)


def large_weight(layer: nn.Module) -> Tensor:
    """The weight of a stock layer's wider convolution."""
    difference: Tensor = layer.weight_diff  # type: ignore[assignment]
    return small_weight(layer) + difference


class SmallDilation(StandardizedWeight, Projection):
    """The weight of the narrower convolution."""

    def standardize(self) -> Tensor:
        return small_weight(self.owner)


class LargeDilation(StandardizedWeight, Projection):
    """The weight of the wider convolution. Once it is standardized, its parameter holds all of it,
    and no difference."""

    def standardize(self) -> Tensor:
        return large_weight(self.owner)

    def sources(self) -> Iterable[Tensor | None]:
        small: Tensor = self.owner.weight  # type: ignore[assignment]
        return *super().sources(), small


class SwitchableForward(nn.Module):
    """The forward of the layer with any two weights."""

    pre_context: nn.Module
    post_context: nn.Module
    switch: nn.Module

    def branch(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight of a convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pre_context(F.adaptive_avg_pool2d(x, 1))
        pooled = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode='reflect'), 5, 1)
        switch = self.switch(pooled)
        narrow = self._convolve('small', x, pooled)
        wide = self._convolve('large', x, pooled)
        out = switch * narrow + (1 - switch) * wide
        return out + self.post_context(F.adaptive_avg_pool2d(out, 1))

    def _convolve(self, name: str, x: Tensor, pooled: Tensor) -> Tensor:
        layer: Any = self
        factor = 1 if name == 'small' else 3
        padding = tuple(factor * size for size in layer.padding)
        dilation = tuple(factor * size for size in layer.dilation)
        x, weight = self.branch(name, x)
        with kept_as_recipe(x):
            if not layer.use_deform:
                return F.conv2d(x, weight, None, layer.stride, padding, dilation, layer.groups)
            offsets = (layer.offset_s if name == 'small' else layer.offset_l)(pooled)
            return deform_conv2d(
                x, offsets, weight, layer.stride, padding, dilation, layer.groups, 1
            )


class SettledSAConv2d(SwitchableForward, SAConv2d):
    """A baked ``SAConv2d``, whose weights are used as they are.

    Attributes:
        quantizers: By name of the convolution: its input's, where it was kept.
    """

    quantizers: Mapping[str, FakeQuantizer | None]

    def branch(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        quantizer = self.quantizers.get(name)
        weight: Tensor = self.get_parameter('weight' if name == 'small' else 'weight_diff')
        return (x if quantizer is None else quantizer.quantize(x)), weight


class CompressedSwitchable(SwitchableForward, Composite):
    """The forward with compressed weights, each with an input step of its own."""

    baked_type = SettledSAConv2d

    weight: Tensor
    weight_diff: Tensor

    @staticmethod
    def bare_weights(module: nn.Module) -> dict[str, BareWeight]:
        return {
            'small': BareWeight('weight', SmallDilation),
            'large': BareWeight('weight_diff', LargeDilation),
        }

    @staticmethod
    def concerned(module: nn.Module) -> bool:
        return any(isinstance(child, Projection) for child in module.children())

    @staticmethod
    def products(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> list[tuple[str, int]]:
        weight: Tensor = module.weight  # type: ignore[assignment]
        count = output.numel() * weight[0].numel()
        return [(name, count) for name in ('small', 'large')]

    def used_layers(self) -> list[CompressedLayer]:
        return [child for child in self.children() if isinstance(child, Projection)]

    def branch(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self._modules.get(name)
        if isinstance(layer, CompressedLayer):
            return layer.quantized_input(x), layer.compressed_weight()
        return x, small_weight(self) if name == 'small' else large_weight(self)

    def keep_quantizers(self) -> None:
        names = ('small', 'large')
        self.quantizers = {name: FakeQuantizer.of(self._modules.get(name)) for name in names}

    @torch.no_grad()
    def settle(self) -> None:
        # Both at once: one is a part of the other.
        weights = [self.branch(name, self.weight)[1].clone() for name in ('small', 'large')]
        for parameter, weight in zip((self.weight, self.weight_diff), weights, strict=True):
            parameter.copy_(weight)
        for layer in [*self.children()]:
            if isinstance(layer, Projection):
                layer.leave()
        self.register_buffer(STANDARDIZED, torch.ones(1, dtype=torch.uint8))
        self.__dict__.setdefault('quantizers', {})


class SlopeSAConv2d(CompressedSwitchable, SAConv2d):
    """``SAConv2d`` with compressed weights and inputs."""


COMPOSITES: dict[type[nn.Module], type[Composite]] = {SAConv2d: SlopeSAConv2d}
register_composites(COMPOSITES)
