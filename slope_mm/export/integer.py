"""The portable graph, rearranged so that ONNX Runtime's CPU provider multiplies integers.

The provider fuses ``DequantizeLinear, Conv, QuantizeLinear`` into an integer convolution only where
the result goes to a single quantizer and the bias is a multiple of the product of both scales. A
residual network's additions break the first condition, and at 4 bits that product is so coarse that
rounding the bias changes codes. Its standard integer convolution is slow with signed weights.

Fast and exact is its ``MatMulIntegerToFloat``: unsigned codes times signed weights, int32 sums, one
scale a column and a floating-point bias. A convolution becomes one such product of its unfolded
input codes, in NHWC, where unfolding copies whole pixels; a 1x1 convolution needs no unfolding. The
transpositions around it cancel between layers when the runtime optimizes the graph. Convolutions
of few input channels (stems) become ``ConvInteger``, with codes in int8 and weights shifted to
uint8, the operand types that its kernel is fast with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slope_mm.export.strips import fixed_sizes, strip_counts
from slope_mm.export.windows import NodeWriter, Window, tag, unfold

# ONNX Runtime's own operators.
RUNTIME_DOMAIN = 'com.microsoft'
INTEGER_OPERATORS = (
    'MatMulIntegerToFloat',
    'ConvInteger',
    'MatMulInteger',
    'QLinearConv',
    'QLinearMatMul',
)
FLOAT_OPERATORS = ('Conv', 'FusedConv', 'ConvTranspose', 'MatMul', 'Gemm', 'FusedMatMul')
# Zero point that carries int8 to uint8.
SHIFT = 128
# From here on a pixel's channels are worth a copy.
UNFOLD_CHANNELS = 16


def to_integer(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """Rearranges a model of :func:`~slope_mm.export.graph.lower` for ONNX Runtime's CPU provider.

    Layers without integers on both sides, grouped convolutions (one small product a group) and
    transposed ones whose windows overlap stay as they are.

    Args:
        model: Is left as it is.
        shape: Shape of an input, as large as inputs usually are: large maps are unfolded in strips.

    Returns:
        A model that computes the same.
    """
    return _Rearrangement(model, strip_counts(model, shape)).run()


def count_products(nodes: Iterable[NodeProto]) -> dict[str, int]:
    """How many integer and floating-point products a graph has, by operator."""
    counts = Counter(node.op_type for node in nodes)
    kinds = (*INTEGER_OPERATORS, *FLOAT_OPERATORS)
    return {kind: counts[kind] for kind in kinds if counts[kind]}


class _Rearrangement(NodeWriter):
    def __init__(self, model: onnx.ModelProto, strips: Mapping[str, int]) -> None:
        super().__init__(model.graph.initializer)
        self.model = model
        self.strips = strips
        self.sizes = fixed_sizes(model)
        self.graph = model.graph
        self.producers = {name: node for node in self.graph.node for name in node.output}
        # Outputs of transposed convolutions: their blocks in NHWC, channels and side of a block.
        self.blocks: dict[str, tuple[str, int, int]] = {}

    def run(self) -> onnx.ModelProto:
        rules = {
            'Conv': self._convolution,
            'ConvTranspose': self._transposed,
            'MatMul': self._linear,
        }
        for node in self.graph.node:
            operands = self._operands(node) if node.op_type in rules else None
            if operands is None:
                self.nodes.append(node)
            else:
                rules[node.op_type](node, *operands)
        nodes = _needed(self.nodes, {output.name for output in self.graph.output})
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            self.graph.name,
            self.graph.input,
            self.graph.output,
            [tensor for name, tensor in self.constants.items() if name in used],
        )
        opsets = [*self.model.opset_import, helper.make_opsetid(RUNTIME_DOMAIN, 1)]
        made = helper.make_model(
            graph, opset_imports=opsets, producer_name=self.model.producer_name
        )
        made.ir_version = self.model.ir_version
        return made

    # --- what there is ----------------------------------------------------------------------------

    def _operands(self, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """The DequantizeLinear nodes of input and weight, if the product can be one of integers."""
        x, weight = (self.producers.get(name) for name in node.input[:2])
        if x is None or weight is None or {x.op_type, weight.op_type} != {'DequantizeLinear'}:
            return None
        stored = self.constants.get(weight.input[0])
        if stored is None or stored.data_type != TensorProto.INT8:
            return None
        attributes = _attributes(node)
        if attributes.get('group', 1) != 1:
            return None
        if node.op_type == 'ConvTranspose' and not _is_tiling(attributes):
            return None
        return x, weight

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def _integers(self, weight: NodeProto) -> np.ndarray:
        return self._array(weight.input[0]).astype(np.int8)

    # --- what becomes of it -----------------------------------------------------------------------

    def _linear(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        codes, zero = self._input_codes(x, np.uint8)
        scales = self._array(weight.input[1])
        self._product(node, codes, zero, x, self._integers(weight), scales, None, node.output[0])

    def _convolution(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        integers = self._integers(weight)
        if integers.shape[1] < UNFOLD_CHANNELS:
            self._direct(node, x, weight)
            return
        attributes = _attributes(node)
        pixels, zero = self._pixel_codes(x)
        pixels = self._padded(pixels, zero, attributes)
        # [out, in, i, j] to [i * j * in, out]
        matrix = integers.transpose(2, 3, 1, 0).reshape(-1, integers.shape[0])
        bias = self._array(node.input[2]) if len(node.input) > 2 else None
        y = node.output[0]
        scales = self._array(weight.input[1])
        strips, size = self.strips.get(y, 1), self.sizes.get(node.input[0])
        if size is not None:
            top, left, bottom, right = attributes['pads']
            size = size[0] + top + bottom, size[1] + left + right
        windows = unfold(self, pixels, integers.shape[1], Window.of(attributes), strips, size)
        parts = [f'{y}.pixels'] if len(windows) == 1 else [f'{w}.of.{y}' for w in windows]
        for rows, part in zip(windows, parts, strict=True):
            self._product(node, rows, zero, x, matrix, scales, bias, part)
        if len(parts) > 1:
            self.node('Concat', parts, f'{y}.pixels', axis=1)
        self.node('Transpose', [f'{y}.pixels'], y, perm=[0, 3, 1, 2])

    def _transposed(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        """Windows that tile the output: every input pixel becomes a block of pixels."""
        pixels, zero = self._pixel_codes(x)
        integers = self._integers(weight)
        channels, size = integers.shape[1], integers.shape[2]
        # [in, out, i, j] to [in, i * j * out]
        matrix = integers.transpose(0, 2, 3, 1).reshape(integers.shape[0], -1)
        scales = np.tile(self._array(weight.input[1]), size * size)
        bias = None
        if len(node.input) > 2:
            bias = np.tile(self._array(node.input[2]), size * size)
        y = node.output[0]
        self._product(node, pixels, zero, x, matrix, scales, bias, f'{y}.blocks')
        self.blocks[y] = f'{y}.blocks', channels, size
        # For consumers that do not quantize; others take the codes of the blocks.
        self.node('Transpose', [self._spread(*self.blocks[y])], y, perm=[0, 3, 1, 2])

    def _spread(self, blocks: str, channels: int, size: int) -> str:
        """``[n, h, w, i * j * c]`` to ``[n, h * i, w * j, c]``, of any type."""
        out = f'{blocks}.spread'
        split = self.numbers([0, 0, 0, size, size, channels])
        self.once('Reshape', [blocks, split], f'{blocks}.split')
        self.once('Transpose', [f'{blocks}.split'], f'{blocks}.turned', perm=[0, 1, 3, 2, 4, 5])
        self.once('Shape', [blocks], f'{blocks}.shape')
        first, last = self.numbers([0]), self.numbers([3])
        self.once('Slice', [f'{blocks}.shape', first, last], f'{blocks}.places')
        growth = self.numbers([1, size, size])
        self.once('Mul', [f'{blocks}.places', growth], f'{blocks}.grown')
        whole = [f'{blocks}.grown', self.numbers([channels])]
        self.once('Concat', whole, f'{blocks}.target', axis=0)
        self.once('Reshape', [f'{blocks}.turned', f'{blocks}.target'], out)
        return out

    def _product(
        self,
        node: NodeProto,
        codes: str,
        zero: str,
        x: NodeProto,
        matrix: np.ndarray,
        scales: np.ndarray,
        bias: np.ndarray | None,
        out: str,
    ) -> None:
        name = node.input[1]
        inputs = [
            codes,
            self.constant(f'{name}.matrix', matrix),
            x.input[1],
            self.constant(f'{name}.scales', scales),
            zero,
            self.constant(f'{name}.zeros', np.zeros(matrix.shape[1], np.int8)),
        ]
        if bias is not None:
            inputs.append(self.constant(f'{name}.bias', bias))
        self.node('MatMulIntegerToFloat', inputs, out, domain=RUNTIME_DOMAIN)

    def _direct(self, node: NodeProto, x: NodeProto, weight: NodeProto) -> None:
        codes, zero = self._input_codes(x, np.int8)
        name, y = node.input[1], node.output[0]
        stored = self.constant(f'{name}.stored', self._integers(weight))
        shift = self.constant('weight.shift', np.int32(SHIFT))
        # Of constants alone: done once, when the graph is loaded.
        self.once('Cast', [stored], f'{name}.wide', to=TensorProto.INT32)
        self.once('Add', [f'{name}.wide', shift], f'{name}.shifted')
        self.once('Cast', [f'{name}.shifted'], f'{name}.unsigned', to=TensorProto.UINT8)
        inputs = [codes, f'{name}.unsigned', zero, self.constant('weight.zero', np.uint8(SHIFT))]
        self.node('ConvInteger', inputs, f'{y}.sums', **_attributes(node))
        scale = float(self._array(x.input[1]))
        both = (self._array(weight.input[1]).astype(np.float64) * scale).astype(np.float32)
        out = y if len(node.input) < 3 else f'{y}.scaled'
        unit = self.constant(f'{name}.unit', both)
        self.node('DequantizeLinear', [f'{y}.sums', unit], out, axis=1)
        if len(node.input) > 2:
            planes = self._array(node.input[2]).reshape(-1, 1, 1)
            self.node('Add', [out, self.constant(f'{name}.planes', planes)], y)

    # --- the input's codes ------------------------------------------------------------------------

    def _input_codes(
        self, x: NodeProto, dtype: type[np.integer], blocks: str | None = None
    ) -> tuple[str, str]:
        """Names of an input's codes and of their zero point, in the type that a product wants.

        Args:
            x: The DequantizeLinear node of the input.
            dtype: int8 or uint8.
            blocks: What is quantized instead: the same values, arranged otherwise.
        """
        kind, limits = np.dtype(dtype).name, np.iinfo(dtype)
        source, low, high = self._quantized(x)
        zero = 0
        if not limits.min <= low <= high <= limits.max:
            zero = SHIFT if limits.min == 0 else -SHIFT
        zero_name = self.constant(f'zero.{kind}.{zero}', dtype(zero))
        codes = f'{x.input[0]}.{kind}' if blocks is None else f'{x.input[0]}.{kind}.blocks'
        self.once('QuantizeLinear', [blocks or source, x.input[1], zero_name], codes)
        if (low + zero, high + zero) != (limits.min, limits.max):
            bounds = [
                self.constant(f'bound.{kind}.{bound}', dtype(bound))
                for bound in (low + zero, high + zero)
            ]
            self.once('Clip', [codes, *bounds], f'{codes}.clipped')
            codes = f'{codes}.clipped'
        return codes, zero_name

    def _quantized(self, x: NodeProto) -> tuple[str, int, int]:
        """What a DequantizeLinear's codes were made of, and the smallest and largest code."""
        quantize = self.producers[x.input[0]]
        limits = np.iinfo(self._array(x.input[2]).dtype)
        low, high = int(limits.min), int(limits.max)
        if quantize.op_type == 'Clip':
            low, high = (int(self._array(name)) for name in quantize.input[1:])
            quantize = self.producers[quantize.input[0]]
        source = quantize.input[0]
        before = self.producers.get(source)
        if low == 0 and before is not None and before.op_type == 'Relu':
            # The lowest code is 0: quantizing clips there itself.
            source = before.input[0]
        return source, low, high

    def _pixel_codes(self, x: NodeProto) -> tuple[str, str]:
        """An input's codes in uint8 and NHWC, and their zero point."""
        source, _, _ = self._quantized(x)
        if source in self.blocks:
            # Blocks of codes are moved instead of blocks of floats: a quarter of the bytes.
            blocks, channels, size = self.blocks[source]
            codes, zero = self._input_codes(x, np.uint8, blocks)
            return self._spread(codes, channels, size), zero
        codes, zero = self._input_codes(x, np.uint8)
        self.once('Transpose', [codes], f'{codes}.pixels', perm=[0, 2, 3, 1])
        return f'{codes}.pixels', zero

    def _padded(self, pixels: str, zero: str, attributes: dict[str, Any]) -> str:
        pads = list(attributes['pads'])
        if not any(pads):
            return pixels
        padded = f'{pixels}.padded.{tag(pads)}'
        amounts = [0, pads[0], pads[1], 0, 0, pads[2], pads[3], 0]
        self.once('Pad', [pixels, self.numbers(amounts), zero], padded)
        return padded


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
        and all(dilation == 1 for dilation in attributes['dilations'])
    )


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that an output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
