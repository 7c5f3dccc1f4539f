"""Exported detectors run: ONNX Runtime sessions in the place of a stock detector's heavy parts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from slope_mm.errors import ExportError
from slope_mm.export.folder import ExportIndex, PartFiles
from slope_mm.export.graph import IR_VERSIONS
from slope_mm.export.parts import DENSE, dense_head, has_rois, roi_heads, unflatten
from slope_mm.export.saturation import without_saturation
from slope_mm.export.skeleton import TRACED_OPSET


def open_session(
    model: str | os.PathLike[str] | bytes,
    threads: int | None = None,
    optimize: bool = True,
    optimized_path: str | None = None,
) -> onnxruntime.InferenceSession:
    """Opens a graph on ONNX Runtime's CPU provider.

    Args:
        model: A file, or its content.
        threads: Threads of one operator; None takes torch's number.
        optimize: Whether the runtime may rearrange the graph.
        optimized_path: Where to write what it made of it.

    Raises:
        ExportError: If the runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    # The runtime says with every optimized file that it suits this machine alone.
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    # Weights of layers that compute in floats are dequantized once instead of at every run.
    options.add_session_config_entry('session.disable_quant_qdq', '1')
    if optimized_path is not None:
        options.optimized_model_filepath = optimized_path
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its classes have no common base but this one
        raise ExportError(f'ONNX Runtime refuses the graph: {error}') from None


def for_this_machine(cpu: bytes) -> bytes:
    """A graph of :func:`~slope_mm.export.integer.to_integer` such that it is exact here."""
    if integer_products_are_exact():
        return cpu
    return without_saturation(onnx.load_from_string(cpu)).SerializeToString()


@functools.lru_cache(maxsize=1)
def integer_products_are_exact() -> bool:
    """Whether this machine adds products of 8 bits without loss.

    x86 without VNNI adds pairs of them in 16 bits, which saturate.
    """
    size = 64
    weight = helper.make_tensor('b', TensorProto.INT8, [size, size], [127] * size * size)
    graph = helper.make_graph(
        [helper.make_node('MatMulInteger', ['a', 'b'], ['y'])],
        'probe',
        [helper.make_tensor_value_info('a', TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info('y', TensorProto.INT32, [size, size])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', TRACED_OPSET)])
    model.ir_version = IR_VERSIONS[TRACED_OPSET]
    codes = torch.full((size, size), 255, dtype=torch.uint8)
    (found,) = outputs_of(open_session(model.SerializeToString(), threads=1), codes)
    return bool((found == size * 255 * 127).all())


class OnnxPart:
    """A part of a detector that an ONNX Runtime session computes.

    Args:
        session: The session.
        structure: How the flat outputs are nested.
        at_once: How many inputs are handed over at a time; None for all of them.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        structure: Any,
        at_once: int | None = None,
    ) -> None:
        self.session, self.structure, self.at_once = session, structure, at_once

    @classmethod
    def load(cls, folder: Path, files: PartFiles, threads: int | None = None) -> OnnxPart:
        """Opens the graph for the CPU provider."""
        content = for_this_machine((folder / files.cpu).read_bytes())
        at_once = files.at_once and files.at_once * (threads or torch.get_num_threads())
        return cls(open_session(content, threads), files.structure, at_once)

    def __call__(self, x: Tensor) -> Any:
        # The sessions compute on the CPU, wherever the rest of the detector does.
        given = x.cpu().contiguous()
        found = _in_pieces(self.session, given, self.at_once or max(1, len(given)))
        return unflatten(self.structure, (output.to(x.device) for output in found))


def _in_pieces(session: onnxruntime.InferenceSession, x: Tensor, size: int) -> list[Tensor]:
    """All outputs for ``size`` inputs at a time; the runtime writes each piece where it belongs."""
    first, *rest = x.split(size)
    found = [torch.from_numpy(array) for array in outputs_of(session, first)]
    if not rest:
        return found
    whole = [piece.new_empty(len(x), *piece.shape[1:]) for piece in found]
    for output, piece in zip(whole, found, strict=True):
        output[:size] = piece
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for number, piece in enumerate(rest, 1):
        _bind(binding.bind_input, session.get_inputs()[0].name, piece)
        for name, output in zip(names, whole, strict=True):
            _bind(binding.bind_output, name, output[number * size :][: len(piece)])
        session.run_with_iobinding(binding)
    return whole


def _bind(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    bind(name, 'cpu', 0, tensor.numpy().dtype, list(tensor.shape), tensor.data_ptr())


class _Dense:
    """Backbone, neck and dense head in one session: the head's results wait for its call."""

    def __init__(self, part: OnnxPart) -> None:
        self.part = part
        self.features: Any = None
        self.outputs: Any = None

    def extract_feat(self, images: Tensor) -> Any:
        self.features, self.outputs = self.part(images)
        return self.features

    def head(self, features: Any) -> Any:
        if features is not self.features:
            raise ExportError(
                'the dense head was called on other features than the last images gave; exported'
                ' detectors predict whole images only'
            )
        return self.outputs


def assemble(
    detector: Any, index: ExportIndex, folder: Path, threads: int | None = None
) -> nn.Module:
    """Puts sessions in the place of a stock detector's heavy parts, and drops its weights."""
    heads = dict(roi_heads(detector)) if has_rois(detector) else {}
    wanted, given = {DENSE, *heads}, {part.name for part in index.parts}
    if wanted != given:
        raise ExportError(
            f"'{folder}' holds the parts {sorted(given)}, but {type(detector).__name__} consists of"
            f' {sorted(wanted)}; give the config that it was exported with'
        )
    for part in index.parts:
        computed = OnnxPart.load(folder, part, threads)
        if part.name != DENSE:
            heads[part.name].forward = computed
            continue
        dense = _Dense(computed)
        detector.extract_feat = dense.extract_feat
        dense_head(detector).forward = dense.head
    for module in detector.modules():
        for key in list(module._parameters):
            module._parameters[key] = None
    return detector.eval()


def outputs_of(session: onnxruntime.InferenceSession, x: Tensor) -> list[np.ndarray]:
    """All outputs of a session."""
    found = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())})
    return list(found)
