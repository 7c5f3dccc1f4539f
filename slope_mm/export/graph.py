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
import onnx.version_converter
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slope_mm.errors import ExportError
from slope_mm.export.layers import ExportedLayer, InputQuantizer
from slope_mm.export.skeleton import DOMAIN, MARKER, TRACED_OPSET

# DequantizeLinear's int4 comes with this opset.
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
    skeleton: onnx.ModelProto, layers: Mapping[str, ExportedLayer]
) -> tuple[onnx.ModelProto, list[LayerCall]]:
    """Puts the layers in the place of their markers.

    Args:
        skeleton: What :func:`~slope_mm.export.skeleton.trace` returned.
        layers: Layers by name.

    Returns:
        The model, and where each layer is called in it.
    """
    return _Lowering(skeleton, layers).run()


def with_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stores weights whose integers fit in 4 bits as int4, two in a byte.

    Args:
        model: What :func:`lower` made; it is left as it is.

    Returns:
        A model of opset 21 that computes the same.

    Raises:
        ExportError: If a node of the model cannot be carried to that opset.
    """
    try:
        wide = onnx.version_converter.convert_version(model, WIDE_OPSET)
    except RuntimeError as error:
        raise ExportError(f'the graph cannot be carried to opset {WIDE_OPSET}: {error}') from None
    wide.ir_version = IR_VERSIONS[WIDE_OPSET]
    stored = {tensor.name: tensor for tensor in wide.graph.initializer}
    for node in wide.graph.node:
        codes = stored.get(node.input[0]) if node.op_type == 'DequantizeLinear' else None
        if codes is None or codes.data_type != TensorProto.INT8:
            continue
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        axis = next(a.i for a in node.attribute if a.name == 'axis')
        values, scales = _in_4_bits(
            numpy_helper.to_array(codes), numpy_helper.to_array(scale), axis
        )
        if values.min() >= -8 and values.max() <= 7:
            zeros = np.zeros(scales.shape)
            for tensor, array in ((codes, values), (zero, zeros)):
                narrow = array.astype(ml_dtypes.int4)
                tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
            scale.CopyFrom(numpy_helper.from_array(scales, scale.name))
    return wide


def _in_4_bits(values: np.ndarray, scales: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels whose codes a norm's sign turned to 8 get them back, and a negative scale."""
    others = tuple(d for d in range(values.ndim) if d != axis)
    signs = np.where(values.max(others) == 8, -1, 1)
    shape = [1] * values.ndim
    shape[axis] = -1
    return values * signs.reshape(shape), (scales * signs).astype(np.float32)


class _Lowering:
    def __init__(self, skeleton: onnx.ModelProto, layers: Mapping[str, ExportedLayer]) -> None:
        self.skeleton, self.layers = skeleton, layers
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
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid('', TRACED_OPSET)], producer_name='slope_mm'
        )
        model.ir_version = IR_VERSIONS[TRACED_OPSET]
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
        codes = self._constant(f'{name}.codes', value)
        scale = self._constant(f'{name}.scale', layer.scale)
        inputs = [codes, scale]
        if value.dtype == np.int8:
            # int32 has no zero point.
            inputs.append(self._constant(f'{name}.zero', np.zeros(layer.scale.shape, np.int8)))
        self._node('DequantizeLinear', inputs, name, axis=axis)
        return name
