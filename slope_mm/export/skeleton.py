"""The graph of a model with its layers as markers: torch traces what lies between them.

torch's exporter would turn a compressed layer into dozens of arithmetic nodes. Here each layer is
one node of a domain of its own that says its name, and :mod:`slope_mm.export.graph` puts integers
in its place. Everything else (pooling, additions, resizing, shapes) is torch's.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from slope_mm.errors import ExportError
from slope_mm.export.layers import exportable, folded_norms
from slope_mm.layers import STOCK_KINDS

DOMAIN = 'slope_mm'
MARKER = 'Layer'
# The newest opset of torch's tracing exporter that all supported versions know.
TRACED_OPSET = 17

_running: dict[str, nn.Module] = {}
_library = torch.library.Library(DOMAIN, 'DEF')
_library.define('layer(Tensor x, str name) -> Tensor')


def _run_layer(x: Tensor, name: str) -> Tensor:
    module = _running[name]
    return type(module).forward(module, x)


_library.impl('layer', _run_layer, 'CompositeExplicitAutograd')


def _symbolic(g: Any, x: Any, name: Any) -> Any:
    y = g.op(f'{DOMAIN}::{MARKER}', x, name_s=name.node().s('value'))
    if x.isCompleteTensor() or x.type().dim() is not None:
        # Layers keep the number of dimensions; the exporter warns of outputs that it cannot tell.
        y.setType(x.type().with_sizes([None] * x.type().dim()))
    return y


class _Marked:
    """Stands for a layer's forward while the model is traced."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        if rest:
            raise ExportError(
                f"layer '{self.name}' is called with more than one input (an output size), which"
                ' cannot be exported'
            )
        return torch.ops.slope_mm.layer(x, self.name)


@contextmanager
def marked(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model whose layers are markers and whose folded norms are gone.

    The copy's quantizers are off: only the graph counts.
    """
    copied = copy.deepcopy(model).eval()
    for name in folded_norms(copied).values():
        parent, _, child = name.rpartition('.')
        setattr(copied.get_submodule(parent), child, nn.Identity())
    layers = {name: module for name, module in copied.named_modules() if exportable(module)}
    for name, module in layers.items():
        if type(module) in STOCK_KINDS:
            module.__class__ = STOCK_KINDS[type(module)]
        _running[name] = module
        module.forward = _Marked(name)
    try:
        yield copied
    finally:
        _running.clear()


def trace(
    module: nn.Module,
    example: Tensor,
    input_name: str,
    output_names: Sequence[str],
    axes: dict[int, str],
) -> onnx.ModelProto:
    """Traces a module that takes one tensor and returns a flat tuple.

    Args:
        module: A module of a :func:`marked` model.
        example: An input.
        input_name: What the graph calls it.
        output_names: What it calls the outputs.
        axes: Names of the input's dynamic axes; outputs are dynamic throughout.

    Returns:
        The graph with markers.

    Raises:
        ExportError: If torch's exporter cannot trace the module.
    """
    torch.onnx.register_custom_op_symbolic(f'{DOMAIN}::layer', _symbolic, TRACED_OPSET)
    options: dict[str, Any] = {}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    content: Any = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Deprecations of the exporter, and Python numbers that the trace turns into constants;
            # whether one of them matters is what the gate finds out at other sizes.
            warnings.simplefilter('ignore')
            torch.onnx.export(
                module,
                (example,),
                content,
                opset_version=TRACED_OPSET,
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_axes={input_name: axes},
                custom_opsets={DOMAIN: 1},
                **options,
            )
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f'torch cannot write {type(module).__name__} as ONNX: {reason[0][:300]}'
        ) from error
    return onnx.load_from_string(content.getvalue())
