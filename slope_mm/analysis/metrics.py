"""Figures of one compressed layer, and of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from slope_mm import ops
from slope_mm.layers import CompressedLayer


@dataclass(frozen=True)
class LayerMetrics:
    """What compression did to one layer's weight.

    Attributes:
        name: Qualified name.
        spec: For example ``'2:4 W4 A4'``.
        cosine: Between latent and compressed weight.
        sqnr_db: Signal to compression noise, dB.
        clipped: Share of the kept weights outside the clip range.
        zeros: Share of the kept weights that quantize to zero.
    """

    name: str
    spec: str
    cosine: float
    sqnr_db: float
    clipped: float
    zeros: float

    @classmethod
    def columns(cls) -> list[str]:
        """Column names of a table of these."""
        return [field.name for field in fields(cls)]

    def values(self) -> tuple[Any, ...]:
        """The row of a table."""
        return astuple(self)


@torch.no_grad()
def layer_metrics(name: str, layer: CompressedLayer) -> LayerMetrics:
    """Measures one layer."""
    w, compressed, mask = layer.latent_weight(), layer.compressed_weight(), layer.mask
    codes, step = layer.slope_spec.weight_codes, layer.step
    clipped = 0.0
    if codes is not None and step is not None:
        clipped = float(ops.clipped_share(w, step, codes, mask))
    return LayerMetrics(
        name,
        str(layer.slope_spec),
        float(ops.cosine(w, compressed)),
        float(ops.sqnr_db(w, compressed)),
        clipped,
        float(ops.zero_share(compressed, mask)),
    )


def summary(rows: Sequence[LayerMetrics]) -> dict[str, float]:
    """Mean and worst cosine, mean SQNR, mean clipped share and zero codes over layers.

    Every layer counts once, as in the paper's motivation table.
    """
    finite = [row.sqnr_db for row in rows if math.isfinite(row.sqnr_db)]
    return {
        'cosine_mean': sum(row.cosine for row in rows) / len(rows),
        'cosine_worst': min(row.cosine for row in rows),
        'sqnr_db': sum(finite) / len(finite) if finite else math.inf,
        'clipped': sum(row.clipped for row in rows) / len(rows),
        'zeros': sum(row.zeros for row in rows) / len(rows),
    }
