"""What ONNX needs to know of a layer: integer weights and their scales, the input's quantizer, one
bias a channel with the batch norm behind it folded in.

In evaluation ``y = gamma (W x + c - mean) / sigma + beta``. The factor ``gamma / sigma`` belongs to
the channel's scale, its sign to the integers, so that scales stay positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slope_mm.errors import ExportError
from slope_mm.folding import batch_norm_pairs
from slope_mm.layers import Composite, CompressedLayer, is_plain, stock_type
from slope_mm.ops import activation_codes, positive

# A dead channel (a norm of weight 0) has no scale; a denormal one would be slow.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class InputQuantizer:
    """How a layer's input becomes integers: ``clip(round(x / scale), low, high)``.

    Attributes:
        scale: The trained step.
        low: Smallest code; 0 for unsigned codes.
        high: Largest code.
    """

    scale: float
    low: int
    high: int


@dataclass(frozen=True)
class ExportedLayer:
    """A convolution, transposed convolution or linear layer as ONNX will hold it.

    Attributes:
        name: Qualified name in the detector.
        kind: ``'conv'``, ``'conv_transpose'`` or ``'linear'``.
        weight: Integers (int8, or int32 where int8 cannot hold them), or fp32 where the weight is
            not quantized; the layer's own shape.
        scale: fp32, one an output channel; None beside an fp32 weight.
        output_axis: Axis of output channels in ``weight``.
        bias: fp32, one an output channel; None without one.
        bits: Bits of a weight code; None at full precision.
        quantizer: The input's; None where it stays as it is.
        attributes: ONNX attributes of the operator.
    """

    name: str
    kind: str
    weight: np.ndarray
    scale: np.ndarray | None
    output_axis: int
    bias: np.ndarray | None
    bits: int | None
    quantizer: InputQuantizer | None
    attributes: dict[str, Any]

    @property
    def groups(self) -> int:
        """Groups of input channels."""
        return int(self.attributes.get('group', 1))


def exportable(module: nn.Module) -> bool:
    """Whether a module is a layer that is put into the graph here.

    Plain layers that ONNX's operators cannot express are left to torch's exporter.
    """
    if not is_plain(module):
        return False
    return isinstance(module, CompressedLayer) or _pads_zeros(module)


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Layer name to the name of the batch norm that is folded into it."""
    return {
        layer: norm
        for layer, norm in batch_norm_pairs(model, any_step=True)
        if exportable(model.get_submodule(layer))
    }


@torch.no_grad()
def describe_layers(model: nn.Module) -> dict[str, ExportedLayer]:
    """All exportable layers of a model in evaluation, by qualified name.

    Args:
        model: A compressed or a plain model.

    Raises:
        ExportError: If a layer's settings have no counterpart in ONNX.
    """
    for name, module in model.named_modules():
        direct = isinstance(module, Composite) and bool(module.used_layers())
        if direct or (isinstance(module, CompressedLayer) and not is_plain(module)):
            stock = stock_type(module)
            # Operators of mmcv's own are none of the runtime's.
            alone = f"leave it alone in training (dict(match='{name}', compress=False)), or "
            raise ExportError(
                f"layer '{name}' ({stock.__name__}) is compressed, and only plain convolutions and"
                f' linear layers can be exported;'
                f' {"" if stock.__module__.startswith("mmcv.ops") else alone}write a packed file'
            )
    norms = folded_norms(model)
    return {
        name: describe_layer(name, module, _norm(model, norms.get(name)))
        for name, module in model.named_modules()
        if exportable(module)
    }


def _norm(model: nn.Module, name: str | None) -> _BatchNorm | None:
    return None if name is None else model.get_submodule(name)  # type: ignore[return-value]


def describe_layer(name: str, module: Any, norm: _BatchNorm | None) -> ExportedLayer:
    """One layer, with the batch norm behind it (see :func:`describe_layers`)."""
    kind = _kind(module)
    if kind == 'conv_transpose' and module.groups > 1:
        raise ExportError(
            f"layer '{name}' is a transposed convolution of {module.groups} groups, which cannot be"
            ' exported; write a packed file'
        )
    axis = 1 if kind == 'conv_transpose' else 0
    factor = torch.ones(module.weight.shape[axis], dtype=torch.float64)
    bias = None if module.bias is None else module.bias.double()
    if norm is not None:
        factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # type: ignore[union-attr]
        shift = norm.bias.double() - norm.running_mean.double() * factor  # type: ignore[union-attr]
        bias = shift if bias is None else bias * factor + shift
    weight, scale, bits = _weight(module, factor, axis)
    return ExportedLayer(
        name,
        kind,
        weight,
        scale,
        axis,
        None if bias is None else bias.float().numpy(),
        bits,
        _quantizer(module),
        _attributes(name, module, kind),
    )


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return 'linear'
    return 'conv_transpose' if isinstance(module, nn.ConvTranspose2d) else 'conv'


def _weight(
    module: Any, factor: Tensor, axis: int
) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    shape = [1] * module.weight.dim()
    shape[axis] = -1
    step = module.step if isinstance(module, CompressedLayer) else None
    if step is None:
        compressed = isinstance(module, CompressedLayer)
        weight = module.compressed_weight() if compressed else module.weight
        return (weight.double() * factor.reshape(shape)).float().numpy(), None, None
    integers, unit = integer_levels(module)
    scale = (unit.expand(factor.numel()) * factor.abs()).clamp_min(SMALLEST_SCALE)
    negated = integers * torch.where(factor < 0, -1, 1).to(integers).reshape(shape)
    # -128 has no negative in int8. A channel that holds one keeps its codes and negates the scale.
    others = [d for d in range(integers.dim()) if d != axis]
    stuck = (integers.amin(others) == -128) & (factor < 0)
    negated = torch.where(stuck.reshape(shape), integers, negated)
    scale = torch.where(stuck, -scale, scale)
    # 8-bit odd levels reach 255. DequantizeLinear takes int8 or int32 in every opset.
    dtype = np.int8 if int(negated.abs().max()) <= 128 else np.int32
    return negated.numpy().astype(dtype), scale.float().numpy(), module.slope_spec.bits


def integer_levels(layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """A layer's levels as integers and the fp64 value of one, by output channel or for all.

    The ``odd`` set's levels lie half a step beside the integers: they become ``2 k + 1`` in units
    of half a step, and masked weights 0.

    Returns:
        int16 tensor of the weight's shape, and scales of shape [channels] or [1].
    """
    codes = layer.slope_spec.weight_codes
    integers = layer.codes()
    unit = positive(layer.step).double().flatten()  # type: ignore[arg-type]
    if codes is not None and codes.offset:
        integers = integers * 2 + int(2 * codes.offset)
        if layer.mask is not None:
            integers = integers * layer.mask
        unit = unit / 2
    return integers, unit


def _quantizer(module: nn.Module) -> InputQuantizer | None:
    if not isinstance(module, CompressedLayer):
        return None
    bits, signed = module.slope_spec.activation_bits, module.activation_signed
    if bits is None or signed is None or module.slope_act_step is None:
        return None
    codes = activation_codes(bits, signed)
    return InputQuantizer(float(positive(module.slope_act_step)), codes.qn, codes.qp)


def _pads_zeros(module: Any) -> bool:
    return getattr(module, 'padding_mode', 'zeros') == 'zeros' and not isinstance(
        getattr(module, 'padding', 0), str
    )


def _attributes(name: str, module: Any, kind: str) -> dict[str, Any]:
    if kind == 'linear':
        return {}
    if not _pads_zeros(module):
        raise ExportError(
            f"layer '{name}' pads with {module.padding_mode!r} ({module.padding!r}), which its ONNX"
            ' operator cannot; only zero padding by numbers can be exported'
        )
    pads = list(module.padding) * 2
    attributes = dict(
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=pads,
        dilations=list(module.dilation),
        group=module.groups,
    )
    if kind == 'conv_transpose':
        attributes['output_padding'] = list(module.output_padding)
    return attributes
