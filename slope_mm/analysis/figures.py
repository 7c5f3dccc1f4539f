"""Pictures of a model's layers. Needs matplotlib, which mmengine brings along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from slope_mm.analysis.metrics import LayerMetrics

# Distinguishable also without colour vision.
ARM_COLOURS = ('#4c72b0', '#dd8452', '#55a868', '#8172b3')


def draw_layers(rows: Sequence[LayerMetrics], path: str | Path, title: str = '') -> None:
    """Draws the cosine and SQNR of every layer, in the model's order.

    Args:
        rows: From :func:`~slope_mm.analysis.metrics.layer_metrics`.
        path: A PNG file; it is replaced when the picture is complete.
        title: Added to the headline.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(3.0, 0.17 * len(rows) + 1.2)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    positions = range(len(rows))
    sparse = [not row.spec.startswith('dense') for row in rows]
    colours = [ARM_COLOURS[0] if s else ARM_COLOURS[1] for s in sparse]
    left.barh(positions, [row.cosine for row in rows], color=colours, height=0.8)
    finite = [row.sqnr_db if row.sqnr_db < 1e3 else 0.0 for row in rows]
    right.barh(positions, finite, color=colours, height=0.8)
    left.set_yticks(positions, [row.name for row in rows], fontsize=6)
    left.invert_yaxis()
    left.set_xlim(min(0.95, *(row.cosine for row in rows)) - 0.02, 1.0)
    left.set_xlabel('cosine of latent and compressed weight')
    right.set_xlabel('SQNR (dB)')
    for axes in (left, right):
        axes.margins(y=0.005)
        axes.grid(axis='x', alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    _legend(figure, {'sparse': ARM_COLOURS[0], 'dense low-bit': ARM_COLOURS[1]})
    mean = sum(row.cosine for row in rows) / len(rows)
    headline = f'mean cosine {mean:.4f}' + (f', {title}' if title else '')
    figure.suptitle(headline, fontsize=10)
    save_figure(figure, Path(path))


def draw_arms(arms: Mapping[str, Sequence[LayerMetrics]], path: str | Path) -> None:
    """Draws the per-layer cosine of several runs of one architecture as lines.

    Args:
        arms: Rows by arm name, in the same layer order.
        path: A PNG file.
    """
    from matplotlib.figure import Figure

    count = max(len(rows) for rows in arms.values())
    figure = Figure(figsize=(max(7.0, 0.16 * count), 4.6), layout='constrained')
    axes = figure.subplots()
    names: list[str] = []
    for (arm, rows), colour in zip(arms.items(), ARM_COLOURS, strict=False):
        names = [row.name for row in rows]
        mean = sum(row.cosine for row in rows) / len(rows)
        axes.plot(
            [row.cosine for row in rows],
            marker='o',
            markersize=3,
            color=colour,
            label=f'{arm} (mean {mean:.4f})',
        )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_ylabel('cosine of latent and compressed weight')
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def _legend(figure: object, entries: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in entries.items()]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles), frameon=False)  # type: ignore[attr-defined]


def save_figure(figure: object, path: Path) -> None:
    """Writes beside the target and renames, so that a picture is never half there."""
    partial = path.with_name(path.name + '.part')
    with matplotlib.rc_context():
        figure.savefig(partial, format='png', dpi=150)  # type: ignore[attr-defined]
    partial.replace(path)
