"""Markers to portable ONNX: QuantizeLinear and DequantizeLinear around plain operators.

A layer with a quantized input becomes ``QuantizeLinear, Clip, DequantizeLinear, Conv``; its weight
is an integer initializer behind a DequantizeLinear with one scale an output channel and zero point
0. uint8 saturates at 255 and int8 at -128 and 127, so fewer bits need a ``Clip``; standing behind
QuantizeLinear, on the integers, it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slope_mm.errors import ExportError
from slope_mm.export.layers import ExportedLayer, InputQuantizer
from slope_mm.export.skeleton import DOMAIN, MARKER, TRACED_OPSET

# QuantizeLinear's int4 and int16 come with this opset.
WIDE_OPSET = 21
IR_VERSIONS = {TRACED_OPSET: 8, WIDE_OPSET: 10}

OPERATORS = {'conv': 'Conv', 'conv_transpose': 'ConvTranspose'}


@dataclass(frozen=True)
class LayerCall:
    """Where one call of a layer is found in a graph; shared layers are called several times.

    Attributes:
        name: The layer.
        input: Tensor that goes into the layer, before its quantizer.
        codes: Tensor of integer input codes; None where the input is not quantized.
        output: Tensor that comes out, behind the folded norm.
    """

    name: str
    input: str
    codes: str | None
    output: str


def lower(
    skeleton: onnx.ModelProto, layers: Mapping[str, ExportedLayer], int4: bool = False
) -> tuple[onnx.ModelProto, list[LayerCall]]:
    """Puts the layers in the place of their markers.

    Args:
        skeleton: What :func:`~slope_mm.export.skeleton.trace` returned.
        layers: Layers by name.
        int4: Store weights that fit in 4 bits as int4 (opset 21) instead of int8.

    Returns:
        The model, and where each layer is called in it.
    """
    return _Lowering(skeleton, layers, int4).run()


class _Lowering:
    def __init__(
        self, skeleton: onnx.ModelProto, layers: Mapping[str, ExportedLayer], int4: bool
    ) -> None:
        self.skeleton, self.layers, self.int4 = skeleton, layers, int4
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.written: set[str] = set()
        self.inputs: dict[tuple[str, InputQuantizer], tuple[str, str]] = {}
        self.calls: list[LayerCall] = []

    def run(self) -> tuple[onnx.ModelProto, list[LayerCall]]:
        for node in self.skeleton.graph.node:
            if node.op_type == MARKER and node.domain == DOMAIN:
                self._lower(node)
            else:
                self.nodes.append(node)
        traced = self.skeleton.graph
        graph = helper.make_graph(
            self.nodes,
            'detector',
            traced.input,
            traced.output,
            [*traced.initializer, *self.constants.values()],
        )
        wide = {TensorProto.INT4, TensorProto.INT16}
        opset = TRACED_OPSET
        if any(tensor.data_type in wide for tensor in self.constants.values()):
            opset = WIDE_OPSET
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid('', opset)], producer_name='slope_mm'
        )
        model.ir_version = IR_VERSIONS[opset]
        return model, self.calls

    def _lower(self, marker: NodeProto) -> None:
        name = next(a.s.decode() for a in marker.attribute if a.name == 'name')
        layer, x, y = self.layers[name], marker.input[0], marker.output[0]
        value, codes = x, None
        if layer.quantizer is not None:
            value, codes = self._quantized_input(x, layer.quantizer, layer.name)
        weight = self._weight(layer)
        bias = None if layer.bias is None else self._constant(f'{name}.bias', layer.bias)
        if layer.kind == 'linear':
            # Gemm would ask for two dimensions.
            product = y if bias is None else f'{y}.product'
            self._node('MatMul', [value, weight], product)
            if bias is not None:
                self._node('Add', [product, bias], y)
        else:
            inputs = [value, weight, *([] if bias is None else [bias])]
            self._node(OPERATORS[layer.kind], inputs, y, **layer.attributes)
        self.calls.append(LayerCall(name, x, codes, y))

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
            if np.ndim(value) == 0:
                # ascontiguousarray makes a vector of a number.
                self.constants[name].ClearField('dims')
        return name

    def _quantized_input(self, x: str, quantizer: InputQuantizer, name: str) -> tuple[str, str]:
        """The names of the dequantized input and of its codes; layers may share both."""
        if (x, quantizer) not in self.inputs:
            dtype = np.uint8 if quantizer.low >= 0 else np.int8
            scale = self._constant(f'{name}.input.scale', np.float32(quantizer.scale))
            zero = self._constant(f'{name}.input.zero', dtype(0))
            codes = f'{x}/{name}.codes'
            self._node('QuantizeLinear', [x, scale, zero], codes)
            limits = np.iinfo(dtype)
            if (quantizer.low, quantizer.high) != (limits.min, limits.max):
                low = self._constant(f'{name}.input.low', dtype(quantizer.low))
                high = self._constant(f'{name}.input.high', dtype(quantizer.high))
                self._node('Clip', [codes, low, high], f'{codes}.clipped')
                codes = f'{codes}.clipped'
            self._node('DequantizeLinear', [codes, scale, zero], f'{codes}.value')
            self.inputs[x, quantizer] = f'{codes}.value', codes
        return self.inputs[x, quantizer]

    def _weight(self, layer: ExportedLayer) -> str:
        """The name of a layer's weight as floats, ``[in, out]`` for linear layers."""
        name, value, axis = f'{layer.name}.weight', layer.weight, layer.output_axis
        if layer.kind == 'linear':
            value, axis = value.T, 1
        if layer.scale is None:
            return self._constant(name, value)
        if name in self.written:
            return name
        self.written.add(name)
        if layer.groups > 1 and layer.kind == 'conv_transpose':
            raise ExportError(
                f"layer '{layer.name}' is a grouped transposed convolution, whose output channels"
                ' lie on no axis of its weight; leave it out of the recipe'
            )
        if self.int4 and value.min() >= -8 and value.max() <= 7:
            value = value.astype(ml_dtypes.int4)
        codes = self._constant(f'{name}.codes', value)
        scale = self._constant(f'{name}.scale', layer.scale)
        zero = self._constant(f'{name}.zero', np.zeros(layer.scale.shape, value.dtype))
        self._node('DequantizeLinear', [codes, scale, zero], name, axis=axis)
        return name
