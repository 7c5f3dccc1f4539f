"""The portable graph, rearranged so that ONNX Runtime's CPU provider multiplies integers.

Where a convolution's result goes to a single quantizer, the provider's ``QLinearConv`` takes codes
to codes (:mod:`slope_mm.export.requantize`). A residual network's additions, pyramid levels and
predictions want floats, which it does not give; and the standard's ``ConvInteger`` is slow with
signed weights.

Fast and exact is ``MatMulIntegerToFloat``: unsigned codes times signed weights, int32 sums, one
scale a column and a floating-point bias. A convolution becomes one such product of its unfolded
input codes, in NHWC, where unfolding copies whole pixels; a 1x1 convolution needs no unfolding. The
transpositions around it cancel between layers when the runtime optimizes the graph. Convolutions
of few input channels (stems) become ``ConvInteger``, with codes in int8 and weights shifted to
uint8, the operand types that its kernel is fast with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slope_mm.export.nodes import NodeWriter, attributes_of, needed, tag
from slope_mm.export.requantize import Codes, Targets, requantized
from slope_mm.export.strips import fixed_sizes, strip_counts
from slope_mm.export.windows import Window, unfold

# ONNX Runtime's own operators.
RUNTIME_DOMAIN = 'com.microsoft'
# Zero point that carries int8 to uint8.
SHIFT = 128
# From here on a pixel's channels are worth a copy.
UNFOLD_CHANNELS = 16
POINTWISE: dict[str, Any] = dict(kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4)


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
        self.targets = Targets(model.graph, self._takes_pixels)
        # Outputs of quantizers whose codes a convolution gives: pixels and their zero point.
        self.ready: dict[str, tuple[str, str]] = {}

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
        nodes = needed(self.nodes, {output.name for output in self.graph.output})
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
        attributes = attributes_of(node)
        if attributes.get('group', 1) != 1:
            return None
        if node.op_type == 'ConvTranspose' and not _is_tiling(attributes):
            return None
        return x, weight

    def _takes_pixels(self, node: NodeProto) -> bool:
        """Whether a node becomes a product of codes in NHWC."""
        if node.op_type not in ('Conv', 'ConvTranspose') or self._operands(node) is None:
            return False
        stored = self.producers[node.input[1]].input[0]
        return node.op_type == 'ConvTranspose' or self.constants[stored].dims[1] >= UNFOLD_CHANNELS

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
        attributes = attributes_of(node)
        bias = self._array(node.input[2]) if len(node.input) > 2 else None
        scales = self._array(weight.input[1])
        if self._to_codes(node, x, integers, scales, bias, attributes):
            return
        pixels, zero = self._pixel_codes(x)
        pixels = self._padded(pixels, zero, attributes)
        # [out, in, i, j] to [i * j * in, out]
        matrix = integers.transpose(2, 3, 1, 0).reshape(-1, integers.shape[0])
        y = node.output[0]
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
        integers = self._integers(weight)
        channels, size = integers.shape[1], integers.shape[2]
        # [in, out, i, j] to [in, i * j * out]
        matrix = integers.transpose(0, 2, 3, 1).reshape(integers.shape[0], -1)
        scales = np.tile(self._array(weight.input[1]), size * size)
        bias = None
        if len(node.input) > 2:
            bias = np.tile(self._array(node.input[2]), size * size)
        if self._to_codes(
            node, x, matrix.T[:, :, None, None], scales, bias, POINTWISE, (channels, size)
        ):
            return
        pixels, zero = self._pixel_codes(x)
        y = node.output[0]
        self._product(node, pixels, zero, x, matrix, scales, bias, f'{y}.blocks')
        self.blocks[y] = f'{y}.blocks', channels, size
        # For consumers that do not quantize; others take the codes of the blocks.
        self.node('Transpose', [self._spread(*self.blocks[y])], y, perm=[0, 3, 1, 2])

    def _to_codes(
        self,
        node: NodeProto,
        x: NodeProto,
        weight: np.ndarray,
        scales: np.ndarray,
        bias: np.ndarray | None,
        window: dict[str, Any],
        block: tuple[int, int] | None = None,
    ) -> bool:
        """Writes a convolution from codes to codes, if its result goes to a single quantizer.

        Args:
            node: The product.
            x: The DequantizeLinear node of its input.
            weight: Its integers, ``[out, in, i, j]``.
            scales: Of an integer, a channel.
            bias: Of a channel, or None.
            window: The convolution's attributes.
            block: Channels and side of the block that a pixel of the result stands for.

        Returns:
            Whether it did.
        """
        target = self.targets.of(node.output[0])
        if target is None:
            return False
        result = self._unsigned(target.value)
        if target.rectified:
            result = result._replace(low=max(result.low, 0))
        made = requantized(weight, scales, bias, self._unsigned(x), result)
        if made is None:
            return False
        given = target.node.output[0]
        name = f'{node.input[1]}.from.{x.input[1]}.to.{target.value.input[1]}.{result.low}'
        pixels, zero_name = self._pixel_codes(x)
        inputs = [
            pixels,
            x.input[1],
            zero_name,
            self.constant(f'{name}.weight', made.weight),
            self.constant(f'{name}.scale', made.scale),
            self.constant(f'{name}.zeros', np.zeros(len(made.scale), np.int8)),
            target.value.input[1],
            self.constant(f'zero.uint8.{result.zero}', np.uint8(result.zero)),
            self.constant(f'{name}.bias', made.bias),
        ]
        codes = self.node(
            'QLinearConv',
            inputs,
            f'{given}.pixels',
            domain=RUNTIME_DOMAIN,
            channels_last=1,
            **window,
        )
        codes = self._clipped(codes, result.low + result.zero, result.high + result.zero, np.uint8)
        if block is not None:
            codes = self._spread(codes, *block)
        self.ready[given] = codes, inputs[7]
        return True

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
        self.node('ConvInteger', inputs, f'{y}.sums', **attributes_of(node))
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
        kind = np.dtype(dtype).name
        source, low, high = self._quantized(x)
        zero = _zero_point(low, high, dtype)
        zero_name = self.constant(f'zero.{kind}.{zero}', dtype(zero))
        codes = f'{x.input[0]}.{kind}' if blocks is None else f'{x.input[0]}.{kind}.blocks'
        self.once('QuantizeLinear', [blocks or source, x.input[1], zero_name], codes)
        return self._clipped(codes, low + zero, high + zero, dtype), zero_name

    def _clipped(self, codes: str, low: int, high: int, dtype: type[np.integer]) -> str:
        """Codes within their bounds, where their type has others."""
        limits, kind = np.iinfo(dtype), np.dtype(dtype).name
        if (low, high) == (limits.min, limits.max):
            return codes
        bounds = [self.constant(f'bound.{kind}.{n}', dtype(n)) for n in (low, high)]
        return self.once('Clip', [codes, *bounds], f'{codes}.clipped')

    def _unsigned(self, x: NodeProto) -> Codes:
        """An input's codes in uint8."""
        _, low, high = self._quantized(x)
        step = float(self._array(x.input[1]))
        return Codes(step, low, high, _zero_point(low, high, np.uint8))

    def _quantized(self, x: NodeProto) -> tuple[str, int, int]:
        """What a DequantizeLinear's codes were made of, and the smallest and largest code."""
        limits = np.iinfo(self._array(x.input[2]).dtype)
        low, high = int(limits.min), int(limits.max)
        clip = self.producers[x.input[0]]
        if clip.op_type == 'Clip':
            low, high = (int(self._array(name)) for name in clip.input[1:])
        source = self._quantizer(x).input[0]
        before = self.producers.get(source)
        if low == 0 and before is not None and before.op_type == 'Relu':
            # The lowest code is 0: quantizing clips there itself.
            source = before.input[0]
        return source, low, high

    def _quantizer(self, x: NodeProto) -> NodeProto:
        """The QuantizeLinear node of a DequantizeLinear's codes."""
        node = self.producers[x.input[0]]
        return self.producers[node.input[0]] if node.op_type == 'Clip' else node

    def _pixel_codes(self, x: NodeProto) -> tuple[str, str]:
        """An input's codes in uint8 and NHWC, and their zero point."""
        given = self._quantizer(x).output[0]
        if given in self.ready:
            return self.ready[given]
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


def _zero_point(low: int, high: int, dtype: type[np.integer]) -> int:
    """The zero point that codes of a range have in a type of 8 bits."""
    limits = np.iinfo(dtype)
    if limits.min <= low <= high <= limits.max:
        return 0
    return SHIFT if limits.min == 0 else -SHIFT


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
