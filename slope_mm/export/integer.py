"""The portable graph, rearranged so that ONNX Runtime's CPU provider multiplies integers.

The provider fuses ``DequantizeLinear, Conv, QuantizeLinear`` into an integer convolution only where
the result goes to a single quantizer and the bias is a multiple of the product of the scales: at 4
bits that product is so coarse that rounding the bias changes codes. Here every convolution becomes
``ConvInteger``, whose int32 sums are exact whatever follows; one DequantizeLinear with a scale a
channel makes them floats, and the bias is added as it is.

The provider's fast kernel multiplies an unsigned left with a signed right operand, and
convolution's left operand is the weight. So weights are shifted to uint8 with zero point 128 (from
int8 constants, when the model is loaded) and inputs are int8. In a linear layer it is the other way
round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

INTEGER_OPERATORS = ('ConvInteger', 'MatMulInteger', 'QLinearConv', 'QLinearMatMul')
SHIFT = 128


def to_integer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rearranges a model of :func:`~slope_mm.export.graph.lower` for ONNX Runtime's CPU provider.

    Layers without integers on both sides, grouped convolutions (one small product a group) and
    transposed ones whose windows overlap stay as they are.

    Args:
        model: Is left as it is.

    Returns:
        A model that computes the same.
    """
    return _Rearrangement(model).run()


def count_integer_operators(nodes: Iterable[NodeProto]) -> dict[str, int]:
    """How many of each integer product, and of convolutions that stayed floats, a graph has."""
    kinds = (*INTEGER_OPERATORS, 'MatMulIntegerToFloat', 'Conv', 'FusedConv', 'ConvTranspose')
    counts = Counter(node.op_type for node in nodes)
    return {kind: counts[kind] for kind in kinds if counts[kind]}


class _Rearrangement:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.nodes: list[NodeProto] = []
        self.made: dict[str, str] = {}

    def run(self) -> onnx.ModelProto:
        for node in self.graph.node:
            operands = self._operands(node)
            if operands is None:
                self.nodes.append(node)
            elif node.op_type == 'MatMul':
                self._linear(node, *operands)
            elif node.op_type == 'Conv':
                self._convolution(node, *operands)
            else:
                self._transposed(node, *operands)
        nodes = _needed(_without_relu(self.nodes), {o.name for o in self.graph.output})
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            self.graph.name,
            self.graph.input,
            self.graph.output,
            [tensor for name, tensor in self.constants.items() if name in used],
        )
        made = helper.make_model(
            graph, opset_imports=self.model.opset_import, producer_name=self.model.producer_name
        )
        made.ir_version = self.model.ir_version
        return made

    # --- what there is ----------------------------------------------------------------------------

    def _operands(self, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """The DequantizeLinear nodes of input and weight, if the product can be one of integers."""
        if node.op_type not in ('Conv', 'ConvTranspose', 'MatMul'):
            return None
        x, weight = (self.producers.get(name) for name in node.input[:2])
        if x is None or weight is None:
            return None
        if {x.op_type, weight.op_type} != {'DequantizeLinear'}:
            return None
        stored = self.constants.get(weight.input[0])
        if stored is None or stored.data_type not in (TensorProto.INT8, TensorProto.INT4):
            return None
        attributes = _attributes(node)
        if attributes.get('group', 1) != 1:
            return None
        if node.op_type == 'ConvTranspose' and not _is_tiling(attributes):
            return None
        return x, weight

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    # --- what becomes of it -----------------------------------------------------------------------

    def _convolution(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        codes, zero = self._input_codes(x, np.int8)
        integers = self._array(weight.input[0]).astype(np.int8)
        y = node.output[0]
        self._product(node, codes, zero, integers, _attributes(node), f'{y}.sums')
        out = y if len(node.input) < 3 else f'{y}.scaled'
        self._scale(x, weight, f'{y}.sums', out, axis=1)
        if len(node.input) > 2:
            bias = self._array(node.input[2]).reshape(-1, 1, 1)
            self._node('Add', [out, self._constant(f'{node.input[2]}.planes', bias)], y)

    def _transposed(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        """Windows that tile the output: a 1x1 convolution to blocks of pixels."""
        codes, zero = self._input_codes(x, np.int8)
        integers = self._array(weight.input[0]).astype(np.int8)
        size = integers.shape[2]
        # [in, out, i, j] to [out * i * j, in, 1, 1]
        blocks = integers.transpose(1, 2, 3, 0).reshape(-1, integers.shape[0], 1, 1)
        y = node.output[0]
        self._product(node, codes, zero, blocks, dict(kernel_shape=[1, 1]), f'{y}.sums')
        out = y if len(node.input) < 3 else f'{y}.scaled'
        # ONNX Runtime moves blocks of floats, not of int32.
        self._scale(x, weight, f'{y}.sums', f'{y}.blocks', axis=1, repeats=size * size)
        self._node('DepthToSpace', [f'{y}.blocks'], out, blocksize=size, mode='CRD')
        if len(node.input) > 2:
            bias = self._array(node.input[2]).reshape(-1, 1, 1)
            self._node('Add', [out, self._constant(f'{node.input[2]}.planes', bias)], y)

    def _linear(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        codes, zero = self._input_codes(x, np.uint8)
        y = node.output[0]
        integers = self._constant(weight.input[0], self._array(weight.input[0]).astype(np.int8))
        self._node('MatMulInteger', [codes, integers, zero], f'{y}.sums')
        self._scale(x, weight, f'{y}.sums', y, axis=-1)

    def _product(
        self,
        node: NodeProto,
        codes: str,
        zero: str,
        integers: np.ndarray,
        attributes: dict[str, Any],
        out: str,
    ) -> None:
        name = node.input[1]
        shifted = f'{name}.unsigned'
        if shifted not in self.made:
            self.made[shifted] = shifted
            stored = self._constant(f'{name}.codes', integers)
            shift = self._constant('weight_shift', np.int32(SHIFT))
            self._node('Cast', [stored], f'{name}.wide', to=TensorProto.INT32)
            self._node('Add', [f'{name}.wide', shift], f'{name}.shifted')
            self._node('Cast', [f'{name}.shifted'], shifted, to=TensorProto.UINT8)
        weight_zero = self._constant('weight_zero', np.uint8(SHIFT))
        self._node('ConvInteger', [codes, shifted, zero, weight_zero], out, **attributes)

    def _scale(
        self, x: NodeProto, weight: NodeProto, sums: str, out: str, axis: int, repeats: int = 1
    ) -> None:
        """Integer sums times both scales."""
        scale, unit = self._array(x.input[1]), self._array(weight.input[1])
        both = (unit.astype(np.float64) * float(scale)).astype(np.float32).repeat(repeats)
        name = self._constant(f'{weight.output[0]}.unit', both)
        self._node('DequantizeLinear', [sums, name], out, axis=axis)

    def _input_codes(self, x: NodeProto, dtype: type[np.integer]) -> tuple[str, str]:
        """Names of an input's codes and zero point in the type that the product wants."""
        clip = self.producers[x.input[0]]
        quantize = self.producers[clip.input[0]] if clip.op_type == 'Clip' else clip
        had = self._array(quantize.input[2]).dtype
        own = np.iinfo(had)
        low, high = int(own.min), int(own.max)
        if clip.op_type == 'Clip':
            low, high = (int(self._array(name)) for name in clip.input[1:])
        limits = np.iinfo(dtype)
        zero = 0
        if not limits.min <= low <= high <= limits.max:
            zero = SHIFT if dtype is np.uint8 else -SHIFT
        low, high = low + zero, high + zero
        name = f'{x.input[0]}.{np.dtype(dtype).name}'
        zero_name = self._constant(f'zero.{np.dtype(dtype).name}.{zero}', dtype(zero))
        if name in self.made:
            return self.made[name], zero_name
        self._node('QuantizeLinear', [quantize.input[0], quantize.input[1], zero_name], name)
        self.made[name] = name
        if (low, high) != (limits.min, limits.max):
            bounds = [self._constant(f'bound.{np.dtype(dtype).name}.{b}', dtype(b)) for b in (low, high)]
            self._node('Clip', [name, *bounds], f'{name}.clipped')
            self.made[name] = f'{name}.clipped'
        return self.made[name], zero_name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        array = np.asarray(value)
        self.constants[name] = helper.make_tensor(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            array.shape,
            array.tobytes(),
            raw=True,
        )
        return name


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _is_tiling(attributes: dict[str, Any]) -> bool:
    """Whether a transposed convolution's windows lie side by side."""
    kernel = list(attributes['kernel_shape'])
    return (
        kernel[0] == kernel[1]
        and list(attributes['strides']) == kernel
        and not any(attributes['pads'])
        and not any(attributes['output_padding'])
        and all(d == 1 for d in attributes['dilations'])
    )


def _without_relu(nodes: list[NodeProto]) -> list[NodeProto]:
    """Lets quantizers of unsigned codes skip the ReLU before them: they clip at 0 themselves."""
    relus = {node.output[0]: node.input[0] for node in nodes if node.op_type == 'Relu'}
    clips = {node.input[0]: node for node in nodes if node.op_type == 'Clip'}
    made = []
    for node in nodes:
        if node.op_type == 'QuantizeLinear' and node.input[0] in relus:
            clip = clips.get(node.output[0])
            bottom = clip.input[1] if clip is not None else node.input[2]
            unsigned = bottom in ('bound.int8.0', 'bound.uint8.0', 'zero.int8.-128', 'zero.uint8.0')
            if unsigned:
                node.input[0] = relus[node.input[0]]
        made.append(node)
    return made


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that an output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
