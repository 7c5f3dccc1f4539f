"""Products of 8 bits on x86 without VNNI, where sums of two of them have to fit in 16 bits.

There ONNX Runtime multiplies unsigned codes with signed weights by ``vpmaddubsw``, which adds
neighbouring products and saturates: ``2 * 255 * |w|`` stays below ``2 ** 15`` up to ``|w| = 64``.
Weights of up to 7 bits never get further; layers of 8 bits (stems, prediction layers) do. Unsigned
codes with unsigned weights are widened to 16 bits before they are multiplied: exact, and somewhat
slower. So these layers alone get unsigned weights, when a graph is opened on such a machine; files
are the same everywhere.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from slope_mm.export.integer import SHIFT

# The largest |w| with 2 * 255 * |w| < 2 ** 15.
LARGEST_WEIGHT = (2**15 - 1) // (2 * 255)


def without_saturation(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives products whose pair sums may pass 16 bits unsigned operands on both sides.

    Args:
        model: What :func:`~slope_mm.export.integer.to_integer` made; it is left as it is.

    Returns:
        A model that computes the same, also where sums of two products saturate.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    rewriting = _Rewriting(changed.graph)
    for node in changed.graph.node:
        if node.op_type == 'MatMulIntegerToFloat':
            rewriting.unsigned_weights(node)
        elif node.op_type == 'ConvInteger':
            rewriting.unsigned_codes(node)
    return changed


class _Rewriting:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.graph = graph

    def unsigned_weights(self, node: NodeProto) -> None:
        """``codes @ weights``, with int8 weights that become uint8 around a zero point."""
        weights, zeros = node.input[1], node.input[5]
        matrix = numpy_helper.to_array(self.constants[weights])
        if matrix.dtype == np.int8 and np.abs(matrix.astype(np.int16)).max() > LARGEST_WEIGHT:
            # Strips share their weights: the second one finds them changed.
            for name in (weights, zeros):
                self._replace(name, _shifted(numpy_helper.to_array(self.constants[name])))

    def unsigned_codes(self, node: NodeProto) -> None:
        """Convolutions of int8 codes with weights that are unsigned already."""
        codes = self.producers[node.input[0]]
        while codes.op_type != 'QuantizeLinear':
            for name in codes.input[1:]:
                self._unsigned(codes, name)
            codes = self.producers[codes.input[0]]
        self._unsigned(codes, codes.input[2])
        self._unsigned(node, node.input[2])

    def _unsigned(self, node: NodeProto, name: str) -> None:
        """Lets one of a node's inputs be a constant's uint8 twin; others may use the constant."""
        value = numpy_helper.to_array(self.constants[name])
        twin = f'{name}.unsigned'
        if value.dtype != np.int8:
            return
        if twin not in self.constants:
            self.constants[twin] = self.graph.initializer.add()
            self._replace(twin, _shifted(value))
        node.input[list(node.input).index(name)] = twin

    def _replace(self, name: str, value: np.ndarray) -> None:
        self.constants[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def _shifted(value: np.ndarray) -> np.ndarray:
    return (value.astype(np.int16) + SHIFT).astype(np.uint8)
