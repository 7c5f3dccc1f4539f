"""Weight-standardized convolutions, compressed after standardization.

Before it, subtracting the mean would fill the zeros and scale every level. A compressed weight is
therefore not one that the stock layer could hold, who would standardize it again: a baked or loaded
layer is told so by ``slope_standardized`` and computes as a plain convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from torch import Tensor, nn

from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.spec import LayerSpec

STANDARDIZED = 'slope_standardized'


class StandardizedWeight(CompressedLayer):
    """A layer whose weight is standardized before it is compressed.

    State beside that of other layers:
        slope_standardized: Buffer, uint8 of shape [1]; present only if ``weight`` is standardized
            already, because it was loaded from a packed file or a baked model.
    """

    slope_standardized: Tensor | None

    def standardize(self) -> Tensor:
        """What the stock layer convolves with."""
        raise NotImplementedError

    def start_compression(self, spec: LayerSpec) -> None:
        self.register_buffer(STANDARDIZED, None)
        super().start_compression(spec)

    def latent_weight(self) -> Tensor:
        return self.standardize() if self.slope_standardized is None else self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + STANDARDIZED in state_dict:
            mark = torch.ones(1, dtype=torch.uint8, device=self.weight.device)
            self.slope_standardized = mark
        elif self._coming_shape(state_dict, prefix) == tuple(self.weight.shape):
            self.slope_standardized = None
        super()._load_from_state_dict(state_dict, prefix, *args)


class CompressedStandardizedConv(StandardizedWeight):
    """The forward of compressed weight-standardized convolutions."""

    baked_type = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        x, w = self.quantized_input(x), self.compressed_weight()
        with kept_as_recipe(x):
            return layer._conv_forward(x, w, layer.bias)

    def settle(self) -> None:
        for name in ('weight_gamma', 'weight_beta'):
            self._buffers.pop(name, None)
        self.__dict__.pop('eps', None)
        # A strict load into the stock layer, who would standardize again, fails on it.
        self.register_buffer(STANDARDIZED, torch.ones(1, dtype=torch.uint8))


class SlopeConvWS2d(CompressedStandardizedConv, ConvWS2d):
    """mmcv's ``ConvWS2d`` with a compressed weight and input."""

    eps: float

    def standardize(self) -> Tensor:
        rows = self.weight.flatten(1)
        mean = rows.mean(1).reshape(-1, 1, 1, 1)
        deviation = rows.std(1).reshape(-1, 1, 1, 1)
        return (self.weight - mean) / (deviation + self.eps)


class SlopeConvAWS2d(CompressedStandardizedConv, ConvAWS2d):
    """mmcv's ``ConvAWS2d`` with a compressed weight and input."""

    def standardize(self) -> Tensor:
        return ConvAWS2d._get_weight(self, self.weight)
