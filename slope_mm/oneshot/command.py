"""What tools/calibrate.py does, and how it tells of it."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from slope_mm import ops
from slope_mm.analysis.output_error import OutputError, output_errors
from slope_mm.convert import compressed_layers
from slope_mm.engine import launch
from slope_mm.engine.calibration import calibrate
from slope_mm.engine.calibration_images import calibration_batches, fixed_statistics, run_losses
from slope_mm.engine.dense_start import load_dense
from slope_mm.errors import ConfigError
from slope_mm.layers import find_weights
from slope_mm.layers.standardized import StandardizedWeight
from slope_mm.oneshot.compress import MEMORY, compensate_model
from slope_mm.packing.container import write_atomically


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        name: Qualified name.
        spec: For example ``'2:4 W4 A4'``.
        sqnr_db: Of the compressed weight against the dense one.
        before: Relative output error with masks by magnitude and plain rounding.
        after: Relative output error of the result.
        note: Why its rounding was not compensated, or ``''``.
    """

    name: str
    spec: str
    sqnr_db: float
    before: float | None
    after: float | None
    note: str


def compress(
    config: Config,
    checkpoint: str,
    *,
    compensated: bool = False,
    batches: int = 4,
    memory: int = MEMORY,
) -> tuple[nn.Module, dict[str, Any], list[LayerResult]]:
    """Builds a config's compressed model from its dense start, without training.

    Half of the images calibrate, the others measure the output errors.

    Args:
        config: A config with a SlopeModel.
        checkpoint: Its dense start.
        compensated: Whether rounding and pruning errors are compensated within each layer.
        batches: Batches that calibrate, and batches that measure.
        memory: Bytes of second moments that may be held at once.

    Returns:
        The model in evaluation mode, the checkpoint's ``meta``, one result per compressed layer.
    """
    dense, meta = load_dense(config, checkpoint)
    model = launch.build_model(config).eval()
    # Steps that the state dict lacks are computed while it loads.
    model.load_state_dict(dense.state_dict(), strict=False)
    images = calibration_batches(config, 2 * batches)
    known, others = images[::2], images[1::2]
    with fixed_statistics(model):
        calibrate(model, known)
    before = output_errors(dense, model, lambda: run_losses(dense, others))
    after, notes = before, {}
    if compensated:
        notes = compensate_model(model, lambda: run_losses(model, known), memory=memory)
        after = output_errors(dense, model, lambda: run_losses(dense, others))
    return model, meta, _results(dense, model, before, after, notes)


def _results(
    dense: nn.Module,
    model: nn.Module,
    before: Mapping[str, OutputError],
    after: Mapping[str, OutputError],
    notes: Mapping[str, str],
) -> list[LayerResult]:
    results = []
    weights = {found.name: found.weight for found in find_weights(dense)}
    for name, layer in compressed_layers(model).items():
        # Standardized weights are compressed after that, and never compensated.
        standardized = isinstance(layer, StandardizedWeight)
        latent = layer.latent_weight() if standardized else weights[name]
        sqnr = float(ops.sqnr_db(latent, layer.compressed_weight()))
        results.append(
            LayerResult(
                name,
                str(layer.slope_spec),
                sqnr,
                before[name].relative if name in before else None,
                after[name].relative if name in after else None,
                notes.get(name, ''),
            )
        )
    return results


def save_start(model: nn.Module, path: str | os.PathLike[str], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint that ``load_from`` and ``tools/test.py`` take.

    Raises:
        PackedFileError: If it cannot be written.
    """
    content = io.BytesIO()
    kept = {'dataset_meta': meta.get('dataset_meta') or {}}
    torch.save({'meta': kept, 'state_dict': copy.copy(model.state_dict())}, content)
    write_atomically(path, content.getvalue())


def table(results: list[LayerResult]) -> str:
    """One line a layer, and the means."""
    if not results:
        raise ConfigError('the recipe compresses no layer')
    width = max(len(result.name) for result in results)
    lines = [f'{"layer":{width}}  {"spec":14}  SQNR dB  output error: plain    result  note']
    for result in results:
        plain, now = (' ' * 9 if e is None else f'{e:9.5f}' for e in (result.before, result.after))
        lines.append(
            f'{result.name:{width}}  {result.spec:14}  {result.sqnr_db:7.2f}'
            f'           {plain}{now}  {result.note}'.rstrip()
        )
    both = [(r.before, r.after) for r in results if r.before is not None and r.after is not None]
    sums = [sum(pair[i] for pair in both) for i in range(2)]
    lines += ['', f'Sum of the relative output errors: plain {sums[0]:.4f}, result {sums[1]:.4f}.']
    return '\n'.join(lines)
