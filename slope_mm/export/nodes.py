"""Nodes and constants of a graph: written, read, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

INTEGER_OPERATORS = (
    'MatMulIntegerToFloat',
    'ConvInteger',
    'MatMulInteger',
    'QLinearConv',
    'QLinearMatMul',
)
FLOAT_OPERATORS = ('Conv', 'FusedConv', 'ConvTranspose', 'MatMul', 'Gemm', 'FusedMatMul')


class NodeWriter:
    """Writes nodes and constants of a graph."""

    def __init__(self, constants: Iterable[TensorProto] = ()) -> None:
        self.constants = {tensor.name: tensor for tensor in constants}
        self.nodes: list[NodeProto] = []
        self._written: set[str] = set()

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Writes a node of one output, and returns that."""
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def once(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node that several layers may share."""
        if output not in self._written:
            self._written.add(output)
            self.node(operator, inputs, output, **attributes)
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A constant; what there is under that name already stays."""
        if name not in self.constants:
            array = np.asarray(value)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            content = np.ascontiguousarray(array).tobytes()
            self.constants[name] = helper.make_tensor(name, kind, array.shape, content, raw=True)
        return name

    def numbers(self, values: Iterable[int]) -> str:
        """A constant vector of int64."""
        listed = list(values)
        return self.constant(f'numbers.{tag(listed)}', np.array(listed, np.int64))


def tag(values: Iterable[int]) -> str:
    """Numbers as part of a name."""
    return '_'.join(map(str, values))


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def count_products(nodes: Iterable[NodeProto]) -> dict[str, int]:
    """How many integer and floating-point products a graph has, by operator."""
    counts = Counter(node.op_type for node in nodes)
    kinds = (*INTEGER_OPERATORS, *FLOAT_OPERATORS)
    return {kind: counts[kind] for kind in kinds if counts[kind]}


def needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that an output depends on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
