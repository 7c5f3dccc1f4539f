"""Exports a detector: traces its parts, writes both graphs of each, and lets the gate judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import ExportError
from slope_mm.export.detector import model_digest
from slope_mm.export.folder import (
    ExportIndex,
    PartFiles,
    check_target,
    checksum,
    staged,
    write_index,
)
from slope_mm.export.gate import PartReport, check_part, refuse
from slope_mm.export.graph import LayerCall, lower, with_int4
from slope_mm.export.integer import to_integer
from slope_mm.export.layers import ExportedLayer, describe_layers
from slope_mm.export.parts import (
    DENSE,
    FlatForward,
    Part,
    capture_inputs,
    detector_parts,
    flatten,
    structure_of,
)
from slope_mm.export.skeleton import DOMAIN, marked, trace
from slope_mm.export.strips import rois_at_once
from slope_mm.packing.plainconfig import to_plain


@dataclass(frozen=True)
class ExportedPart:
    """One part as graphs, in memory.

    Attributes:
        name: The part.
        input: Name of the graphs' input.
        structure: How the outputs are nested.
        portable: The graph for any runtime.
        cpu: The graph for ONNX Runtime's CPU provider.
        calls: Where the portable graph calls which layer.
    """

    name: str
    input: str
    structure: Any
    portable: onnx.ModelProto
    cpu: onnx.ModelProto
    calls: list[LayerCall]


def export_parts(
    detector: nn.Module, inputs: Mapping[str, Sequence[Tensor]], int4: bool = False
) -> list[ExportedPart]:
    """Makes the graphs of a detector's parts.

    Args:
        detector: Compressed or plain, in evaluation mode.
        inputs: At least one input of each part.
        int4: Store weights that fit as int4 in the portable graphs.

    Raises:
        ExportError: If a part cannot be exported.
    """
    layers = describe_layers(detector)
    with marked(detector) as copied:
        return [
            _export_part(part, inputs[part.name][0], layers, int4)
            for part in detector_parts(copied)
        ]


@torch.no_grad()
def _export_part(
    part: Part, example: Tensor, layers: Mapping[str, ExportedLayer], int4: bool
) -> ExportedPart:
    nested = part.module(example)
    names = [f'output_{i}' for i in range(len(flatten(nested)))]
    skeleton = trace(FlatForward(part.module), example, part.input_name, names, part.axes)
    _refuse_foreign(skeleton, part.name)
    portable, calls = lower(skeleton, layers)
    cpu = to_integer(portable, example.shape)
    if int4:
        portable = with_int4(portable)
    for graph in (portable, cpu):
        _check(graph, part.name)
    return ExportedPart(part.name, part.input_name, structure_of(nested), portable, cpu, calls)


def _refuse_foreign(skeleton: onnx.ModelProto, name: str) -> None:
    for node in skeleton.graph.node:
        if node.domain not in ('', 'ai.onnx', DOMAIN):
            raise ExportError(
                f"the graph of '{name}' needs {node.domain}::{node.op_type}, an operator that ONNX"
                ' Runtime lacks, whether or not its layer is compressed; write a packed file'
            )


def _check(graph: onnx.ModelProto, name: str) -> None:
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph of '{name}' is no valid ONNX: {error}") from None


def export_onnx(
    detector: nn.Module,
    folder: str | os.PathLike[str],
    batches: Sequence[dict[str, Any]],
    dataset_meta: Mapping[str, Any] | None = None,
    int4: bool = False,
    judge: Callable[[Path], Mapping[str, Any]] | None = None,
) -> ExportIndex:
    """Exports a detector, if what was exported computes what was trained.

    Args:
        detector: A compressed detector; it is left as it is.
        folder: Where to: a new or empty folder, or an earlier export.
        batches: Real inputs, as a dataloader gives them.
        dataset_meta: Class names and the like.
        int4: Store weights that fit as int4 in the portable graphs.
        judge: Looks at the finished folder before it takes its place, returns facts for the
            index, and raises if they do not do.

    Returns:
        The index, which is also in the folder.

    Raises:
        ExportError: If a part cannot be exported or does not compute what was trained; nothing is
            written then.
    """
    check_target(folder)
    detector = detector.eval()
    parts = detector_parts(detector)
    inputs: dict[str, list[Tensor]] = {}
    with _refusing_uncalibrated(detector):
        for batch in batches:
            for name, found in capture_inputs(detector, batch).items():
                inputs.setdefault(name, []).extend(found)
    for part in parts:
        if part.name not in inputs:
            raise ExportError(
                f"'{part.name}' got no input from the {len(batches)} images: nothing was detected;"
                ' give other images'
            )
    exported = export_parts(detector, inputs, int4)
    modules = {part.name: part.module for part in parts}
    step = _size_step(detector)
    reports = [
        check_part(
            part.name,
            part.portable,
            part.cpu,
            part.calls,
            detector,
            modules[part.name],
            inputs[part.name],
            step if part.name == DENSE else None,
        )
        for part in exported
    ]
    refuse(reports)
    recipe = getattr(detector, 'slope_recipe', None)
    stock = getattr(detector, 'slope_config', None)
    facts: dict[str, Any] = {
        'model': None if stock is None else model_digest(stock),
        'recipe': None if recipe is None else to_plain(recipe.to_dict(), 'recipe'),
        'gate': {part.name: report.facts() for part, report in zip(exported, reports, strict=True)},
    }
    with staged(folder) as stage:
        files = [write_part(part, stage) for part in exported]
        told = to_plain(dict(dataset_meta or {}), 'dataset_meta')
        index = ExportIndex(files, type(detector).__name__, told, facts)
        write_index(stage, index)
        if judge is not None:
            facts['metrics'] = dict(judge(stage))
            write_index(stage, index)
    return index


def _size_step(detector: Any) -> int:
    """By how many pixels images that a detector takes differ at least; 32 or more."""
    divisor = int(getattr(detector.data_preprocessor, 'pad_size_divisor', 1) or 1)
    return divisor * -(-32 // divisor)


@contextmanager
def _refusing_uncalibrated(detector: nn.Module) -> Iterator[None]:
    """Refuses layers that run within the scope and have no input range; idle ones have none."""
    ran: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, layer in compressed_layers(detector).items()
        if not layer.calibrated
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    names = list(dict.fromkeys(ran))
    if names:
        raise ExportError(
            f"{len(names)} input quantizers have no range yet ('{names[0]}', ...); train or"
            ' calibrate before exporting'
        )


def write_part(part: ExportedPart, folder: Path) -> PartFiles:
    names = f'{part.name}.onnx', f'{part.name}.cpu.onnx'
    sums = {}
    for name, graph in zip(names, (part.portable, part.cpu), strict=True):
        (folder / name).write_bytes(graph.SerializeToString())
        sums[name] = checksum(folder / name)
    at_once = None if part.name == DENSE else rois_at_once(part.cpu)
    return PartFiles(part.name, *names, part.input, part.structure, sums, at_once)


__all__ = ['DENSE', 'ExportedPart', 'PartReport', 'export_onnx', 'export_parts']
