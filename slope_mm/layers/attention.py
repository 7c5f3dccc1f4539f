"""Attention whose projections are compressed: torch's own forward with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import BareWeight, Composite, Projection, ThreeInputs
from slope_mm.layers.fake_quantize import AttentionFakeQuantize, FakeQuantizer
from slope_mm.layers.substitution import alone, with_tensors

Place = tuple[nn.Module, str, Tensor | None]


class CompressedAttention(Composite):
    """The forward of attention with compressed projections.

    ``in_proj`` (or ``q_proj``, ``k_proj`` and ``v_proj`` where keys or values have a size of their
    own) and ``out_proj`` are compressed layers each. Query, key and value have an activation step
    each: in DETR's family position embeddings are added to the first two alone.
    """

    out_proj: Any
    batch_first: bool

    @staticmethod
    def bare_weights(module: nn.Module) -> dict[str, BareWeight]:
        packed = BareWeight('in_proj_weight', ThreeInputs)
        single = {f'{x}_proj': BareWeight(f'{x}_proj_weight', Projection) for x in 'qkv'}
        return {
            name: bare
            for name, bare in {'in_proj': packed, **single}.items()
            if getattr(module, bare.parameter) is not None
        }

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        with alone():
            return self._compressed_forward(query, key, value, *args, **kwargs)

    def _compressed_forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        places: list[Place] = []
        inputs = [query, key, value]
        for layer in (*self.used_layers(), self.out_proj):
            if isinstance(layer, CompressedLayer):
                layer.batch_axis = self._batch_axis(query)
        for which, name in enumerate(('q_proj', 'k_proj', 'v_proj')):
            layer = self._modules.get(name)
            if isinstance(layer, CompressedLayer):
                inputs[which] = layer.quantized_input(inputs[which])
                places.append((self, f'{name}_weight', layer.compressed_weight()))
        packed = self._modules.get('in_proj')
        if isinstance(packed, CompressedLayer):
            inputs = [packed.quantized_input(x, which) for which, x in enumerate(inputs)]
            places.append((self, 'in_proj_weight', packed.compressed_weight()))
        places += self._output_places()
        with kept_as_recipe(*inputs), with_tensors(*places):
            output, weights = super().forward(*inputs, *args, **kwargs)
        return (self.out_proj(output) if self._projects_after else output), weights

    @staticmethod
    def uncalled(module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule('out_proj')]

    @staticmethod
    def products(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> list[tuple[str, int]]:
        given = {**dict(zip(('query', 'key', 'value'), args, strict=False)), **kwargs}
        inputs = [given['query'], given['key'], given['value']]
        counts: dict[str, int] = {}
        for name, bare in CompressedAttention.bare_weights(module).items():
            rows = getattr(module, bare.parameter).shape[0]
            if name == 'in_proj':
                counts[name] = sum(x.numel() for x in inputs) * (rows // 3)
            else:
                counts[name] = inputs['qkv'.index(name[0])].numel() * rows
        counts['out_proj'] = output[0].numel() * output[0].shape[-1]
        return list(counts.items())

    def used_layers(self) -> list[CompressedLayer]:
        return [m for m in self.children() if isinstance(m, CompressedLayer)]

    def keep_quantizers(self) -> None:
        packed = self._modules.get('in_proj')
        single = [self._modules.get(f'{x}_proj') for x in 'qkv']
        inputs = [
            FakeQuantizer.of(one) or FakeQuantizer.of(packed, which)
            for which, one in enumerate(single)
        ]
        AttentionFakeQuantize(inputs, FakeQuantizer.of(self.out_proj)).register(self)

    def _batch_axis(self, query: Tensor) -> int | None:
        if query.dim() < 3:
            return None
        return 0 if self.batch_first else 1

    @property
    def _projects_after(self) -> bool:
        out = self.out_proj
        return isinstance(out, CompressedLayer) and out.slope_spec.activation_bits is not None

    def _output_places(self) -> list[Place]:
        out = self.out_proj
        if not isinstance(out, CompressedLayer):
            return []
        if not self._projects_after:
            out.count_run()
            return [(out, 'weight', out.compressed_weight())]
        # Its input is quantized, and lies inside torch's function: that one projects by the
        # identity, which changes no number, and the layer itself runs on the result.
        identity = torch.eye(len(out.weight)).to(out.weight)
        stock: Tensor | None = out._parameters['bias']
        bias = None if stock is None else torch.zeros_like(stock)
        return [(out, 'weight', identity), (out, 'bias', bias)]


class SlopeMultiheadAttention(CompressedAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with compressed projections and inputs."""


class SlopeTransformerEncoderLayer(Composite, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that calls its layers in evaluation too."""

    # torch's fast path reads all weights of the layers below; it asks for this first.
    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)
