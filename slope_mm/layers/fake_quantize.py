"""Input quantizers of baked models: torch's own fake-quantize in hooks of stock layers.

They hold plain numbers, so that a model's state dict stays the stock one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_mm.layers.activation import first_input, input_name
from slope_mm.layers.base import CompressedLayer
from slope_mm.ops import activation_codes, positive


class FakeQuantizer(NamedTuple):
    """One input's quantizer."""

    step: float
    low: int
    high: int

    @classmethod
    def of(cls, layer: nn.Module | None, which: int = 0) -> FakeQuantizer | None:
        """That of a compressed layer's input; None where it is not quantized."""
        if not isinstance(layer, CompressedLayer) or layer.slope_act_step is None:
            return None
        bits, signed = layer.slope_spec.activation_bits, layer.input_signed(which)
        if bits is None or signed is None:
            return None
        codes = activation_codes(bits, signed)
        return cls(float(positive(layer.slope_act_step[which])), codes.qn, codes.qp)

    def quantize(self, x: Tensor) -> Tensor:
        """Quantizes an input."""
        return torch.fake_quantize_per_tensor_affine(x, self.step, 0, self.low, self.high)


class StockFakeQuantize:
    """A forward pre-hook that quantizes a layer's input."""

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self.quantizer = quantizer

    def register(self, module: nn.Module) -> None:
        """Registers itself."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        listed = isinstance(x, list)
        found: Any = (
            [self.quantizer.quantize(one) for one in x] if listed else self.quantizer.quantize(x)
        )
        if args:
            return (found, *args[1:]), kwargs
        return (), {**kwargs, input_name(kwargs): found}


class AttentionFakeQuantize:
    """Hooks of ``nn.MultiheadAttention`` that quantize query, key, value and what is projected out.

    The latter lies inside torch's function: that one projects by the identity, which changes no
    number, and the hook behind it projects.
    """

    names = ('query', 'key', 'value')

    def __init__(self, inputs: list[FakeQuantizer | None], output: FakeQuantizer | None) -> None:
        self.inputs, self.output = inputs, output

    def register(self, module: nn.Module) -> None:
        """Registers the hooks."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.output is not None:
            module.register_forward_hook(self.after, always_call=True)

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before attention's forward."""
        found, named = list(args), dict(kwargs)
        for which, (name, quantizer) in enumerate(zip(self.names, self.inputs, strict=True)):
            if quantizer is not None and which < len(found):
                found[which] = quantizer.quantize(found[which])
            elif quantizer is not None:
                named[name] = quantizer.quantize(named[name])
        if self.output is not None:
            out = module.out_proj
            out.__dict__['weight'] = torch.eye(out.in_features).to(out.weight)
            out.__dict__['bias'] = None if out.bias is None else torch.zeros_like(out.bias)
        return tuple(found), named

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Behind attention's forward."""
        out = module.out_proj
        for name in ('weight', 'bias'):
            out.__dict__.pop(name, None)
        if output is None or self.output is None:
            # The forward failed.
            return None
        return F.linear(self.output.quantize(output[0]), out.weight, out.bias), output[1]
