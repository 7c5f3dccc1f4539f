"""mmdet's own layers with compressed weights. Imported when a model has one (see ``kinds``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.layers import NormedConv2d, NormedLinear
from torch import Tensor, nn

from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import Composite
from slope_mm.layers.fake_quantize import FakeQuantizer, StockFakeQuantize
from slope_mm.layers.kinds import register, register_composites
from slope_mm.layers.substitution import CompressedOperator, alone, with_tensors


class SlopeNormedLinear(CompressedOperator, NormedLinear):
    """``NormedLinear`` with a compressed weight, whose rows are normalized after, and input.

    A factor for each row keeps zeros and evenly spaced levels.
    """


class SlopeNormedConv2d(CompressedOperator, NormedConv2d):
    """``NormedConv2d`` with a compressed weight, which is normalized after, and input.

    Normalized over input channels alone, a filter's levels are spaced evenly at each position of
    its kernel, not over all of them.
    """


class CompressedTrident(CompressedLayer):
    """The forward of compressed convolutions with three dilations: one weight, one input step."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        with alone():
            quantized = [self.quantized_input(x) for x in inputs]
            weight = self.compressed_weight()
            with kept_as_recipe(*quantized), with_tensors((self, 'weight', weight)):
                return super().forward(quantized)


class SlopeTridentConv(CompressedTrident, TridentConv):
    """``TridentConv`` with a compressed weight and inputs."""


class TaskFakeQuantize(StockFakeQuantize):
    """A forward pre-hook of task decomposition; its layer attention gets what was there before."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        features, pooled = self._named(*args, **kwargs)
        if pooled is None:
            pooled = F.adaptive_avg_pool2d(features, 1)
        return (self.quantizer.quantize(features), pooled), {}

    @staticmethod
    def _named(feat: Tensor, avg_feat: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return feat, avg_feat


class CompressedTaskDecomposition(Composite):
    """The forward of TOOD's task decomposition, who scales its convolution's weight itself."""

    reduction_conv: Any

    @staticmethod
    def uncalled(module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule('reduction_conv.conv')]

    @staticmethod
    def products(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> list[tuple[str, int]]:
        conv = module.get_submodule('reduction_conv.conv')
        weight: Tensor = conv.weight  # type: ignore[assignment]
        return [('reduction_conv.conv', output.numel() * weight[0].numel())]

    def used_layers(self) -> list[CompressedLayer]:
        conv = self.reduction_conv.conv
        return [conv] if isinstance(conv, CompressedLayer) else []

    def keep_quantizers(self) -> None:
        quantizer = FakeQuantizer.of(self.reduction_conv.conv)
        if quantizer is not None:
            TaskFakeQuantize(quantizer).register(self)

    def forward(self, feat: Tensor, avg_feat: Tensor | None = None) -> Tensor:
        conv = self.reduction_conv.conv
        if not isinstance(conv, CompressedLayer):
            return super().forward(feat, avg_feat)
        if avg_feat is None:
            avg_feat = F.adaptive_avg_pool2d(feat, (1, 1))
        with alone():
            x, w = conv.quantized_input(feat), conv.compressed_weight()
            with kept_as_recipe(x), with_tensors((conv, 'weight', w)):
                return super().forward(x, avg_feat)


class SlopeTaskDecomposition(CompressedTaskDecomposition, TaskDecomposition):
    """``TaskDecomposition`` whose reduction has a compressed weight and input."""


KINDS: dict[type[nn.Module], type[CompressedLayer]] = {
    NormedLinear: SlopeNormedLinear,
    NormedConv2d: SlopeNormedConv2d,
    TridentConv: SlopeTridentConv,
}
COMPOSITES: dict[type[nn.Module], type[Composite]] = {TaskDecomposition: SlopeTaskDecomposition}
register(KINDS)
register_composites(COMPOSITES)
