"""What is compressed and how, how far the weights moved, and how large the result is."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.analysis.metrics import layer_metrics
from slope_mm.analysis.size import StoredBits, own_tensors, stored_bits, tensor_bits
from slope_mm.convert import LayerPlan, pattern_name, plan
from slope_mm.errors import StorageError
from slope_mm.layers import FoundWeight, LayerSpec, Projection, find_weights, stock_type
from slope_mm.layers.find import is_table
from slope_mm.recipe import Recipe
from slope_mm.wholefile import write_whole

COLUMNS = (
    'name',
    'kind',
    'shape',
    'pattern',
    'bits',
    'activation_bits',
    'note',
    'cosine',
    'sqnr_db',
    'weights',
    'dense_bits',
    'stored_bits',
)


@dataclass(frozen=True)
class Row:
    """One layer that owns parameters or saved buffers.

    Attributes:
        name: Qualified stock name.
        kind: Stock class name.
        shape: Shape of its weight, or of its first tensor.
        pattern: ``'2:4'``, ``'dense'``, or ``''`` where nothing is compressed.
        bits: Weight bits; None at full precision.
        activation_bits: Input bits; None at full precision.
        note: Why it is not compressed, or gets less than the recipe asks for.
        cosine: Between latent and compressed weight; None where not compressed.
        sqnr_db: dB; None where not compressed.
        weights: Number of weights in a matrix product or convolution.
        dense_bits: What the stock layer takes.
        stored: What the compressed layer takes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    bits: int | None
    activation_bits: int | None
    note: str
    cosine: float | None
    sqnr_db: float | None
    weights: int
    dense_bits: int
    stored: StoredBits

    @property
    def stored_bits(self) -> int:
        """Total of ``stored``."""
        return self.stored.total

    def cells(self) -> list[Any]:
        """Values in the order of ``COLUMNS``."""
        return [getattr(self, column) for column in COLUMNS]


@dataclass(frozen=True)
class Report:
    """Rows and totals of a model; ``str()`` prints a table."""

    rows: tuple[Row, ...]
    title: str = ''

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the compressed model: codes, index, steps, and all that is not compressed."""
        return math.ceil(sum(row.stored_bits for row in self.rows) / 8)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the stock model's state dict."""
        return sum(row.dense_bits for row in self.rows) // 8

    @property
    def ratio(self) -> float:
        """``dense_bytes / stored_bytes``."""
        return self.dense_bytes / max(self.stored_bytes, 1)

    @property
    def totals(self) -> dict[str, Any]:
        """Everything that is summed up below the table."""
        compressed = [row for row in self.rows if row.pattern]
        weights = sum(row.weights for row in self.rows)
        cosines = [row.cosine for row in compressed if row.cosine is not None]
        sqnrs = [
            row.sqnr_db
            for row in compressed
            if row.sqnr_db is not None and math.isfinite(row.sqnr_db)
        ]
        sparse = [row for row in compressed if row.pattern != 'dense']
        return {
            'layers': len(compressed),
            'weights': weights,
            'compressed_share': sum(r.weights for r in compressed) / max(weights, 1),
            'sparse_share': sum(r.weights for r in sparse) / max(weights, 1),
            'cosine_mean': sum(cosines) / len(cosines) if cosines else None,
            'cosine_worst': min(cosines) if cosines else None,
            'sqnr_db': sum(sqnrs) / len(sqnrs) if sqnrs else None,
            'code_bytes': sum(r.stored.codes for r in self.rows) / 8,
            'index_bytes': sum(r.stored.index for r in self.rows) / 8,
            'step_bytes': sum(r.stored.steps for r in self.rows) / 8,
            'other_bytes': sum(r.stored.other for r in self.rows) / 8,
            'stored_bytes': self.stored_bytes,
            'dense_bytes': self.dense_bytes,
            'ratio': self.ratio,
        }

    def to_csv(self, path: str | Path) -> None:
        """Writes one row a layer."""
        text = io.StringIO(newline='')
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for row in self.rows:
            cells = row.cells()
            cells[2] = 'x'.join(map(str, row.shape))
            writer.writerow(['' if cell is None else cell for cell in cells])
        try:
            write_whole(path, text.getvalue().encode())
        except OSError as error:
            raise StorageError(
                f"the report '{path}' cannot be written ({error.strerror}); choose another place"
            ) from error

    def __str__(self) -> str:
        header = ('layer', 'kind', 'shape', 'pattern', 'W', 'A', 'cosine', 'SQNR dB', 'kB', 'note')
        table: list[tuple[str, ...]] = [header]
        rest: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.pattern and row.weights == 0:
                rest.setdefault((row.kind, row.note), []).append(row)
                continue
            table.append(_cells(row))
        for (kind, note), rows in rest.items():
            # Norms and the like: one line a kind.
            kilobytes = sum(row.stored_bits for row in rows) / 8e3
            table.append((f'{len(rows)} x', kind, '', '', '', '', '', '', f'{kilobytes:.1f}', note))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, '  '.join('-' * width for width in widths))
        return '\n'.join(
            ([self.title, ''] if self.title else []) + lines + ['', self.total_lines()]
        )

    def total_lines(self) -> str:
        """The totals in two or three sentences."""
        t = self.totals
        text = (
            f'{t["layers"]} layers hold {t["compressed_share"]:.2%} of the'
            f' {t["weights"]:,} weights compressed ({t["sparse_share"]:.2%} sparse).\n'
            f'Stored: {t["stored_bytes"] / 1e6:.2f} MB = codes {t["code_bytes"] / 1e6:.2f} + index'
            f' {t["index_bytes"] / 1e6:.2f} + steps {t["step_bytes"] / 1e6:.2f} + not compressed'
            f' {t["other_bytes"] / 1e6:.2f}; dense {t["dense_bytes"] / 1e6:.2f} MB; ratio'
            f' {t["ratio"]:.1f}x (calculated).'
        )
        if t['cosine_mean'] is not None:
            sqnr = '' if t['sqnr_db'] is None else f', mean SQNR {t["sqnr_db"]:.2f} dB'
            text += f'\nCosine: mean {t["cosine_mean"]:.4f}, worst {t["cosine_worst"]:.4f}{sqnr}.'
        return text


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.kind,
        'x'.join(map(str, row.shape)),
        row.pattern or '-',
        '32' if row.bits is None else str(row.bits),
        '32' if row.activation_bits is None else str(row.activation_bits),
        '' if row.cosine is None else f'{row.cosine:.4f}',
        '' if row.sqnr_db is None else f'{row.sqnr_db:.2f}',
        f'{row.stored_bits / 8e3:.1f}',
        row.note,
    )


@torch.no_grad()
def report(
    model: nn.Module, recipe: Mapping[str, Any] | Recipe | None = None, title: str = ''
) -> Report:
    """Reports on a compressed model, or on what a recipe would make of a dense one.

    Args:
        model: A compressed model; or, with ``recipe``, a dense one.
        recipe: What would be done to a dense model (nothing is changed).
        title: A line above the printed table.

    Returns:
        One row per layer that owns parameters or saved buffers, each shared layer once.

    Raises:
        RecipeError: If the recipe does not fit the model.
    """
    plans = {}
    if recipe is not None:
        plans = {(p.module, p.parameter): p for p in plan(model, recipe)}
    weights: dict[nn.Module, list[FoundWeight]] = {}
    for weight in find_weights(model):
        weights.setdefault(weight.owner, []).append(weight)
    rows = []
    # What is tied is one tensor; a layer that compresses it otherwise stores its own codes.
    counted: dict[int, LayerSpec | None] = {}
    for name, module in model.named_modules():
        tensors = dict(own_tensors(module))
        if not tensors or all(id(tensor) in counted for tensor in tensors.values()):
            continue
        for weight in weights.get(module, []):
            # A bare parameter is a row of its own; a layer's other tensors belong to its row.
            alone = weight.kind is not None and issubclass(weight.kind, Projection)
            own = {weight.parameter: tensors.pop(weight.parameter)} if alone else tensors
            planned = plans.get((module, weight.parameter))
            rows.append(_row(weight, own, planned, counted))
            tensors = tensors if alone else {}
        if tensors:
            rows.append(_rest(name, module, tensors, counted))
    return Report(tuple(rows), title)


def _told(weight: FoundWeight, planned: LayerPlan | None) -> tuple[LayerSpec | None, str]:
    if weight.layer is not None:
        return weight.layer.slope_spec, weight.layer.slope_spec.note
    if planned is not None:
        return planned.spec, planned.reason
    return None, weight.obstacle or 'excluded by a rule'


def _row(
    weight: FoundWeight,
    tensors: dict[str, Tensor],
    planned: LayerPlan | None,
    counted: dict[int, LayerSpec | None],
) -> Row:
    spec, reason = _told(weight, planned)
    metrics = None if weight.layer is None else layer_metrics(weight.name, weight.layer)
    axis, inputs = (0, 1) if weight.kind is None else (weight.kind.output_axis, weight.kind.inputs)
    # A hook may compute the weight (spectral norm and its kin): then none of the tensors is it.
    matrix = tensors.get(weight.parameter, weight.weight)
    fresh = {key: tensor for key, tensor in tensors.items() if id(tensor) not in counted}
    if spec is None or (id(matrix) in counted and counted[id(matrix)] == spec):
        stored = StoredBits(other=sum(map(tensor_bits, fresh.values())))
    else:
        stored = stored_bits(
            {**fresh, weight.parameter: matrix}, weight.parameter, spec, axis, inputs
        )
    counted.update(dict.fromkeys(map(id, fresh.values())))
    counted[id(matrix)] = spec
    multiplied = [
        tensor
        for key, tensor in tensors.items()
        if tensor.dim() > 1
        and tensor.is_floating_point()
        and (key == weight.parameter or weight.kind is None)
        and not is_table(weight.owner, key)
    ]
    return Row(
        weight.name,
        stock_type(weight.owner).__name__,
        tuple(matrix.shape),
        pattern_name(spec),
        None if spec is None else spec.bits,
        None if spec is None else spec.activation_bits,
        reason,
        None if metrics is None else metrics.cosine,
        None if metrics is None else metrics.sqnr_db,
        sum(tensor.numel() for tensor in multiplied),
        sum(map(tensor_bits, fresh.values())),
        stored,
    )


def _rest(
    name: str,
    module: nn.Module,
    tensors: dict[str, Tensor],
    counted: dict[int, LayerSpec | None],
) -> Row:
    """What is no weight of a matrix product or convolution: norms, biases of attention."""
    bits = sum(tensor_bits(tensor) for tensor in tensors.values() if id(tensor) not in counted)
    counted.update(dict.fromkeys(map(id, tensors.values())))
    shown = max(tensors.values(), key=lambda tensor: tensor.dim())
    reason = 'not a matrix product or convolution'
    kind = stock_type(module).__name__
    shape = tuple(shown.shape)
    stored = StoredBits(other=bits)
    return Row(name, kind, shape, '', None, None, reason, None, None, 0, bits, stored)
