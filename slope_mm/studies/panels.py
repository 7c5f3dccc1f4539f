"""What a study's pictures share: panels, colours, points with error bars, legends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slope_mm.analysis.figures import save_figure
from slope_mm.studies.results import Results
from slope_mm.studies.statistics import Summary, summarize
from slope_mm.studies.study import FigureSpec, Task

# Okabe and Ito's, without the yellow: distinguishable also without colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000', '#7F7F7F')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
PANEL = (4.6, 3.7)


def new_figure(panels: int, height: float = PANEL[1]) -> tuple[Any, list[Any]]:
    """A figure and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0] * panels, height), layout='constrained')
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.25, linewidth=0.6)
        one.spines[['top', 'right']].set_visible(False)
    return figure, list(axes)


def finish(
    figure: Any, axes: Sequence[Any], spec: FigureSpec, task: Task, results: Results, path: Path
) -> bool:
    """Legend below all panels, title above, file."""
    counts = {
        len(rows)
        for arms in spec.series.values()
        for arm in arms
        if (rows := results.of(task.name, arm))
    }
    low, high = min(counts), max(counts)
    seeds = str(low) if low == high else f'{low} to {high}'
    spread = 'one seed' if high == 1 else f'mean ± standard deviation over {seeds} seeds'
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    draw_legend(figure, entries, 3 * len(axes))
    headline = f'{spec.title} ({task.title})' if spec.title else task.title
    figure.suptitle(f'{headline}\n{spread}', fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return True


def draw_legend(figure: Any, entries: Mapping[str, Any], most: int) -> None:
    """A legend below the panels, in as many columns (``most`` at most) as the picture is wide."""
    for columns in range(min(len(entries), most), 0, -1):
        legend = figure.legend(
            entries.values(),
            entries.keys(),
            loc='outside lower center',
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def points_of(
    results: Results,
    task: Task,
    arms: Sequence[str],
    metric: str,
    where: Callable[[Mapping[str, Any]], Any],
) -> list[tuple[Any, Summary, str]]:
    """(x, summary of the metric, arm) of the arms that have rows."""
    found = []
    for arm in arms:
        values = results.by_seed(task.name, arm, metric)
        if values:
            x = where(results.of(task.name, arm)[0])
            found.append((x, summarize(list(values.values())), arm))
    return found


def draw_reference(axes: Any, results: Results, task: Task, spec: FigureSpec, metric: str) -> None:
    """The reference arm as a line with a band of one standard deviation."""
    if spec.reference is None:
        return
    values = results.by_seed(task.name, spec.reference, metric)
    if not values:
        return
    summary = summarize(list(values.values()))
    axes.axhline(summary.mean, color='0.35', linestyle='--', linewidth=1, label=spec.reference)
    if summary.deviation:
        low, high = summary.mean - summary.deviation, summary.mean + summary.deviation
        axes.axhspan(low, high, color='0.35', alpha=0.1, linewidth=0)


def draw_series(
    axes: Any,
    index: int,
    label: str,
    points: Sequence[tuple[float, Summary]],
    line: str = '-',
    face: str | None = None,
) -> None:
    """One series' points with error bars."""
    axes.errorbar(
        [x for x, _ in points],
        [summary.mean for _, summary in points],
        [summary.deviation or 0.0 for _, summary in points],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=line,
        markersize=5,
        markerfacecolor=face or COLOURS[index % len(COLOURS)],
        linewidth=1.3,
        capsize=2.5,
        label=label,
    )
