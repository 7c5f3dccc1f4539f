"""The gate of an export: on real inputs, does the graph compute what was trained?

Three questions, from the inside out. Are a layer's stored integers its trained codes? Given the
same input, does every call of every layer find the same input codes and the same output? Do whole
parts, also at other sizes and batches, give the outputs that PyTorch gives?

The last one cannot ask for equality where inputs are quantized: sums in another order differ in
the last bit of a float, and now and then such a bit decides between two codes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from slope_mm.errors import ExportError
from slope_mm.export.graph import LayerCall
from slope_mm.export.layers import exportable, folded_norms
from slope_mm.export.nodes import count_products
from slope_mm.export.parts import flatten
from slope_mm.export.runtime import for_this_machine, open_session, outputs_of
from slope_mm.layers import CompressedLayer
from slope_mm.ops import activation_codes, positive, to_codes

# Relative errors ||found - expected|| / ||expected||.
LAYER_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 1e-2
# Where PyTorch's own outputs move further than that when its layers' results move in their last
# bits (a single code of one early layer may change half of a small image's codes later on), a few
# times that much; a graph that computes something else is off by 1.
NOISE = 1e-6
NOISE_DRAWS = 3
NOISE_FACTOR = 3
LARGEST_TOLERANCE = 0.5
# Largest difference of a metric between checkpoint and export.
METRIC_TOLERANCE = 1e-3
# Inputs that every layer is looked at with; whole parts are compared on all of them.
LAYER_INPUTS = 1
# Calls looked at in one run, which holds all their tensors.
CALLS_PER_RUN = 12


@dataclass(frozen=True)
class LayerReport:
    """What the gate found in one layer.

    Attributes:
        name: The layer.
        weights: Stored weight codes that are not the trained ones.
        codes: Input codes that are not the trained quantizer's.
        inputs: Input codes that were compared.
        error: Largest relative error of an output.
    """

    name: str
    weights: int
    codes: int
    inputs: int
    error: float


@dataclass(frozen=True)
class PartReport:
    """What the gate found in one part.

    Attributes:
        name: The part.
        layers: One report a layer.
        errors: Relative error of the outputs over all inputs, by graph.
        tolerance: What they may be.
        operators: Integer and floating-point products in the optimized graph for the CPU.
        where: Of the largest error, by graph, at which input, and what the runtime said of it.
        noise: How far the detector's own outputs move by rounding; 0 where nobody had to ask.
    """

    name: str
    layers: list[LayerReport]
    errors: dict[str, float]
    tolerance: float
    operators: dict[str, int]
    where: dict[str, str] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def worst(self) -> LayerReport | None:
        """The layer that differs most; None in a part without layers."""
        return max(
            self.layers,
            key=lambda la: (la.weights, la.codes / max(la.inputs, 1), la.error),
            default=None,
        )

    @property
    def passes(self) -> bool:
        """Whether all is within its tolerance."""
        outputs = all(error <= self.tolerance for error in self.errors.values())
        return self.layers_pass and outputs

    @property
    def layers_pass(self) -> bool:
        """Whether every layer is within its tolerance."""
        return all(
            la.weights == 0 and la.codes == 0 and la.error <= LAYER_TOLERANCE for la in self.layers
        )

    def facts(self) -> dict[str, Any]:
        """For the index."""
        return {
            'output_error': self.errors,
            'output_tolerance': self.tolerance,
            'operators': self.operators,
            'input_codes_compared': sum(layer.inputs for layer in self.layers),
            'worst_layer': None if self.worst is None else asdict(self.worst),
        }


def check_part(
    name: str,
    portable: onnx.ModelProto,
    cpu: onnx.ModelProto,
    calls: Sequence[LayerCall],
    detector: nn.Module,
    module: nn.Module,
    inputs: Sequence[Tensor],
    size_step: int | None = None,
) -> PartReport:
    """Compares one part's graphs with the detector.

    Args:
        name: The part.
        portable: Its graph for any runtime.
        cpu: Its graph for ONNX Runtime's CPU provider.
        calls: Where the portable graph calls which layer.
        detector: The trained detector, in evaluation mode.
        module: The part in it.
        inputs: Real inputs of the part.
        size_step: By how many pixels sizes of maps that the part takes differ; None where their
            size is fixed.
    """
    inputs = _variants(module, inputs, size_step)
    layers = _check_layers(portable, calls, detector, inputs[:LAYER_INPUTS])
    errors: dict[str, float] = {}
    operators: dict[str, int] = {}
    where: dict[str, str] = {}
    for kind, graph in (('portable', portable), ('cpu', cpu)):
        content = graph.SerializeToString()
        if kind == 'cpu':
            content = for_this_machine(content)
        session = open_session(content)
        errors[kind], where[kind] = max(_output_error(session, module, x) for x in inputs)
        if kind == 'cpu':
            operators = optimized_operators(content)
    tolerance, noise = OUTPUT_TOLERANCE, 0.0
    if any(call.codes is not None for call in calls):
        tolerance = QUANTIZED_TOLERANCE
        if max(errors.values()) > tolerance:
            noise = max(_own_noise(module, x) for x in inputs)
            tolerance = min(max(tolerance, NOISE_FACTOR * noise), LARGEST_TOLERANCE)
    return PartReport(name, layers, errors, tolerance, operators, where, noise)


def refuse(reports: Sequence[PartReport]) -> None:
    """Raises unless every part passes.

    Raises:
        ExportError: Says which layer differs most.
    """
    for report in reports:
        if report.passes:
            continue
        worst = report.worst
        kind = max(report.errors, key=lambda graph: report.errors[graph])
        place = report.where.get(kind)
        told = (
            f"the export of '{report.name}' does not compute what was trained: the outputs of its"
            f' {kind} graph differ by {report.errors[kind]:.2g} (allowed: {report.tolerance:g})'
            + (f' {place}' if place else '')
        )
        if report.layers_pass and NOISE_FACTOR * report.noise > LARGEST_TOLERANCE:
            raise ExportError(
                f'{told}, while each of its layers does by itself; but rounding alone moves the'
                f" detector's own outputs by {report.noise:.2g} here, so that they decide nothing:"
                ' give larger images, or those that it was trained for (--images). Nothing was'
                ' written'
            )
        if worst is None or report.layers_pass:
            raise ExportError(
                f'{told}, while each of its layers does by itself: what lies between them is not'
                ' exported as it is, at sizes that the trace fixed perhaps. Nothing was written'
            )
        raise ExportError(
            f"{told}, and layer '{worst.name}' differs most: {worst.weights} weight codes,"
            f' {worst.codes} of {worst.inputs} input codes, output by {worst.error:.2g} (allowed:'
            f' 0, 0, {LAYER_TOLERANCE:g}). Nothing was written'
        )


def judge_metrics(expected: Mapping[str, float], found: Mapping[str, float]) -> None:
    """Compares the metrics of checkpoint and export.

    Raises:
        ExportError: If a mAP differs by more than ``METRIC_TOLERANCE``, or there is none.
    """
    # The parts of it (one IoU, one size) rest on few objects. LVIS calls it AP.
    names = [name for name in expected if name.endswith(('mAP', 'AP'))]
    if not names:
        raise ExportError(
            'the evaluation of checkpoint and export gives no mAP to compare'
            f' ({", ".join(expected) or "no metric at all"}); give test_evaluator a metric that'
            ' does, or leave --evaluate out. Nothing was written'
        )
    for name in names:
        # Without a single detection there are no metrics.
        value, other = expected[name], found.get(name, 0.0)
        if not abs(other - value) <= METRIC_TOLERANCE + 1e-9:
            raise ExportError(
                f'the export scores {name} {other:.4f}, the checkpoint {value:.4f}: more than'
                f' {METRIC_TOLERANCE} apart. Nothing was written'
            )


def optimized_operators(content: bytes) -> dict[str, int]:
    """Integer and floating-point products of a graph as ONNX Runtime runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'optimized.onnx'
        open_session(content, optimized_path=str(path))
        return count_products(onnx.load(path).graph.node)


def relative_error(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """``||found - expected|| / ||expected||`` in fp64; infinite for other shapes or NaN."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return float('inf')
    norm = float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b)) / (norm if norm > 0 else 1.0)
    return error if np.isfinite(error) else float('inf')


@torch.no_grad()
def _variants(module: nn.Module, inputs: Sequence[Tensor], size_step: int | None) -> list[Tensor]:
    """The inputs, and one of another height, width and batch: traces may hide constants."""
    first = inputs[0]
    if size_step is None:
        return [*inputs, torch.cat([first, first.flip(0)[: max(1, len(first) // 2)]])]
    batch = torch.cat([first, first.flip(3)])
    changed = F.pad(batch, (0, 2 * size_step, 0, size_step))
    try:
        module(changed)
    except RuntimeError:
        # A detector of images of one size.
        changed = batch
    return [*inputs, changed]


@torch.no_grad()
def _output_error(session: Any, module: nn.Module, x: Tensor) -> tuple[float, str]:
    """The largest relative error, and for which input."""
    expected = flatten(module(x))
    place = f'for an input of {"x".join(map(str, x.shape))}'
    try:
        found = outputs_of(session, x)
    except Exception as error:  # the runtime's errors have no common base but this one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return float('inf'), f'{place} (ONNX Runtime: {reason[:300]})'
    if len(found) != len(expected):
        return float('inf'), place
    pairs = zip(found, expected, strict=True)
    return max(relative_error(a, b) for a, b in pairs), place


@torch.no_grad()
def _own_noise(module: nn.Module, x: Tensor) -> float:
    """How far PyTorch's outputs move when the results of its layers move in their last bits.

    At every layer: what moves in the images alone ends at the first quantizer.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator))

    expected = flatten(module(x))
    layers = [layer for layer in module.modules() if exportable(layer)]
    handles = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        moved = [flatten(module(x)) for _ in range(NOISE_DRAWS)]
    finally:
        for handle in handles:
            handle.remove()
    return max(relative_error(a, b) for y in moved for a, b in zip(y, expected, strict=True))


# --- layer by layer ------------------------------------------------------------------------------


@torch.no_grad()
def _check_layers(
    portable: onnx.ModelProto,
    calls: Sequence[LayerCall],
    detector: nn.Module,
    inputs: Sequence[Tensor],
) -> list[LayerReport]:
    norms = folded_norms(detector)
    constants = {tensor.name: tensor for tensor in portable.graph.initializer}
    found: dict[str, LayerReport] = {}
    for start in range(0, len(calls), CALLS_PER_RUN):
        chunk = calls[start : start + CALLS_PER_RUN]
        session = open_session(_with_outputs(portable, chunk), optimize=False)
        names = [output.name for output in session.get_outputs()]
        for x in inputs:
            tensors = dict(zip(names, outputs_of(session, x), strict=True))
            for call in chunk:
                layer = detector.get_submodule(call.name)
                norm = detector.get_submodule(norms[call.name]) if call.name in norms else None
                weights = _wrong_weights(layer, norm, constants, call.name)
                report = _check_call(call, layer, norm, tensors, weights)
                found[call.name] = _merged(found.get(call.name), report)
    return list(found.values())


def _merged(a: LayerReport | None, b: LayerReport) -> LayerReport:
    if a is None:
        return b
    return LayerReport(
        a.name, b.weights, a.codes + b.codes, a.inputs + b.inputs, max(a.error, b.error)
    )


def _with_outputs(model: onnx.ModelProto, calls: Sequence[LayerCall]) -> bytes:
    """A model that also returns what goes in and out of layers."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    inputs = {value.name for value in model.graph.input}
    del tapped.graph.output[:]
    names = dict.fromkeys(
        name
        for call in calls
        for name in (call.input, call.codes, call.output)
        if name is not None and name not in inputs
    )
    for name in inputs:
        # An input cannot be an output; a copy of it can.
        tapped.graph.node.append(helper.make_node('Identity', [name], [f'{name}.tap']))
    names.update(dict.fromkeys(f'{name}.tap' for name in inputs))
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return tapped.SerializeToString()


def _check_call(
    call: LayerCall,
    layer: Any,
    norm: nn.Module | None,
    tensors: dict[str, np.ndarray],
    weights: int,
) -> LayerReport:
    x = torch.from_numpy(tensors.get(call.input, tensors.get(f'{call.input}.tap')))
    wrong = compared = 0
    if call.codes is not None:
        codes = activation_codes(layer.slope_spec.activation_bits, layer.activation_signed)
        expected = to_codes(x, positive(layer.slope_act_step), codes).numpy()
        wrong = int((tensors[call.codes] != expected).sum())
        compared = expected.size
    y = layer(x)
    if norm is not None:
        y = norm(y)
    return LayerReport(call.name, weights, wrong, compared, relative_error(tensors[call.output], y))


def _wrong_weights(layer: Any, norm: Any, constants: dict[str, onnx.TensorProto], name: str) -> int:
    """How many stored integers are not the compressed weight in units of the stored scale.

    The scale itself is checked by the outputs; here it is the trained step (or half of it, where
    levels lie between the integers).
    """
    stored = constants.get(f'{name}.weight.codes')
    if stored is None or not isinstance(layer, CompressedLayer) or layer.step is None:
        return 0
    integers = numpy_helper.to_array(stored).astype(np.int64)
    if isinstance(layer, nn.Linear):
        integers = integers.T
    codes = layer.slope_spec.weight_codes
    unit = positive(layer.step).double() / (2 if codes is not None and codes.offset else 1)
    expected = (layer.compressed_weight().double() / unit).round().long().numpy()
    signs: np.ndarray = np.ones(1, np.int64)
    if norm is not None:
        scale = numpy_helper.to_array(constants[f'{name}.weight.scale'])
        # A negative factor negates the codes or, where they have no negative, the scale.
        signs = np.where((norm.weight.numpy() < 0) != (scale < 0), -1, 1)
        shape = [1] * integers.ndim
        shape[layer.output_axis] = -1
        signs = signs.reshape(shape)
    return int((integers != expected * signs).sum())
