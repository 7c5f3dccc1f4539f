"""A study's pictures: accuracy against size, bits, N:M and lambda, and curves over iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slope_mm.ops import parse_pattern
from slope_mm.studies.panels import (
    COLOURS,
    PANEL,
    draw_reference,
    draw_series,
    finish,
    new_figure,
    points_of,
)
from slope_mm.studies.results import Results
from slope_mm.studies.statistics import summarize
from slope_mm.studies.study import FigureSpec, Study, Task
from slope_mm.studies.tables import metric_label

CURVES = {
    'cosine': 'mean cosine of W and Ŵ',
    'sqnr_db': 'mean SQNR (dB)',
    'flip_rate': 'mask flips since the last look (%)',
}
# Sizes closer than this share a label.
SAME_SIZE = 1.12


def draw_figures(study: Study, results: Results, folder: Path) -> list[Path]:
    """Draws all figures of a study, one file a figure and task.

    Returns:
        The files; figures without a single point are left out.
    """
    written = []
    for spec in study.figures:
        for task in study.tasks:
            if spec.tasks is not None and task.name not in spec.tasks:
                continue
            path = folder / f'{spec.name}_{task.name}.png'
            if DRAWERS[spec.kind](spec, task, results, path):
                written.append(path)
    return written


def _draw_size(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Accuracy against size in MB."""
    sources = {r['bytes_from'] for r in results.rows if r['task'] == task.name and r['bits']}
    label = 'file (MB)' if sources == {'file'} else 'calculated size (MB)'
    return _draw_cost(spec, task, results, path, lambda row: row['bytes'] / 1e6, label)


def _draw_operations(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Accuracy against the bit operations of an image."""
    label = 'bit operations an image (10⁹)'
    return _draw_cost(spec, task, results, path, lambda row: row['gbops'], label)


def _draw_cost(
    spec: FigureSpec,
    task: Task,
    results: Results,
    path: Path,
    cost: Callable[[Mapping[str, Any]], float],
    label_of_cost: str,
) -> bool:
    """Accuracy against a cost, logarithmic; error bars are standard deviations."""
    figure, axes = new_figure(len(task.metrics), PANEL[1] + 0.5)
    any_hollow = False
    named = 0
    for one, metric in zip(axes, task.metrics, strict=True):
        draw_reference(one, results, task, spec, metric)
        labels: list[tuple[float, str]] = []
        for index, (label, arms) in enumerate(spec.series.items()):
            points = points_of(results, task, arms, metric, lambda row: row)
            # Arms of one cost would hide each other.
            dodge = 1 + 0.018 * (index - (len(spec.series) - 1) / 2)
            for hollow in (False, True):
                placed = [
                    (cost(row) * dodge, summary)
                    for row, summary, _ in points
                    if (row['activation_bits'] is not None) == hollow
                ]
                if placed:
                    face = 'white' if hollow else None
                    draw_series(one, spec.look(label), label, placed, '', face)
                    any_hollow |= hollow
            labels += [(cost(row), setting(row)) for row, _, _ in points]
        one.set_xscale('log')
        one.margins(x=0.08)
        _plain_log_ticks(one)
        one.set_ylabel(metric_label(metric))
        one.set_xlabel(label_of_cost)
        _name_sizes(one, labels)
        named += len(labels)
    if any_hollow:
        axes[0].autoscale(False)
        axes[0].plot(
            [], [], 'o', color='0.3', markerfacecolor='white', label='hollow: low-bit inputs'
        )
    return named > 0 and finish(figure, axes, spec, task, results, path)


def pattern_label(name: str | None) -> str:
    """``'2:4'``, ``'dense'``, ``'unstr. 12.5 %'``."""
    if name is None:
        return 'dense'
    if name.startswith('unstructured'):
        return f'unstr. {100 * parse_pattern(name).density:g} %'
    return name


def setting(row: Mapping[str, Any]) -> str:
    """``'2:4 W4 A4'``, ``'dense W2'``, ``'fp32'``: what a row's weights and inputs are."""
    if row['sparsity'] is None and row['bits'] is None:
        return 'fp32'
    parts = [pattern_label(row['sparsity']), f'W{row["bits"] or 32}']
    if row['activation_bits'] is not None:
        parts.append(f'A{row["activation_bits"]}')
    return ' '.join(parts)


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_sizes(axes: Any, labels: Sequence[tuple[float, str]]) -> None:
    """Says above the plot which setting has which size; near ones share a place."""
    groups: list[tuple[list[float], list[str]]] = []
    for size, text in sorted(set(labels)):
        if groups and size / groups[-1][0][0] < SAME_SIZE:
            groups[-1][0].append(size)
            if text not in groups[-1][1]:
                groups[-1][1].append(text)
        else:
            groups.append(([size], [text]))
    top = axes.secondary_xaxis('top')
    top.set_xscale('log')
    places = [math.sqrt(sizes[0] * sizes[-1]) for sizes, _ in groups]
    top.minorticks_off()
    top.set_xticks(
        places,
        ['\n'.join(texts) for _, texts in groups],
        fontsize=7,
        rotation=90,
        ha='center',
        multialignment='left',
        linespacing=1.0,
    )
    top.tick_params(length=2, color='0.6')
    top.spines['top'].set_visible(False)
    for place in places:
        axes.axvline(place, color='0.85', linewidth=0.8, zorder=0)


def _draw_bits(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Accuracy against weight bits; full precision counts as 32 and stands at the right end."""
    found = {
        row['bits'] or 32
        for arms in spec.series.values()
        for arm in arms
        for row in results.of(task.name, arm)
    }
    order = sorted(found)
    names = ['fp32' if bits == 32 else str(bits) for bits in order]
    return _categories(
        spec, task, results, path, order, names, lambda row: row['bits'] or 32, 'weight bits'
    )


def _draw_sparsity(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Accuracy against the pattern, densest first."""
    found = {
        row['sparsity'] or 'dense'
        for arms in spec.series.values()
        for arm in arms
        for row in results.of(task.name, arm)
    }

    def key(name: str) -> tuple[float, bool, int, str]:
        if name == 'dense':
            return -1.0, False, 0, name
        group = 0 if name.startswith('unstructured') else int(name.split(':')[1])
        return -parse_pattern(name).density, group == 0, -group, name

    order = sorted(found, key=key)
    names = [pattern_label(None if n == 'dense' else n).replace('. ', '.\n') for n in order]
    label = 'pattern (kept : group)'
    return _categories(
        *(spec, task, results, path, order, names),
        lambda row: row['sparsity'] or 'dense',
        label,
        line='',
    )


def _categories(
    spec: FigureSpec,
    task: Task,
    results: Results,
    path: Path,
    order: Sequence[Any],
    names: Sequence[str],
    where: Callable[[Mapping[str, Any]], Any],
    label: str,
    line: str = '-',
) -> bool:
    """Accuracy against categories, evenly spaced."""
    if not order:
        return False
    figure, axes = new_figure(len(task.metrics))
    for one, metric in zip(axes, task.metrics, strict=True):
        draw_reference(one, results, task, spec, metric)
        for index, (series, arms) in enumerate(spec.series.items()):
            points = points_of(results, task, arms, metric, where)
            # Side by side, so that error bars do not hide each other.
            dodge = 0.06 * (index - (len(spec.series) - 1) / 2)
            placed = sorted(
                (order.index(x) + dodge, summary.mean, summary) for x, summary, _ in points
            )
            if placed:
                placed_at = [(x, summary) for x, _, summary in placed]
                draw_series(one, spec.look(series), series, placed_at, line)
        one.set_xticks(range(len(order)), names)
        one.set_xlim(-0.4, len(order) - 0.6)
        one.set_xlabel(label)
        one.set_ylabel(metric_label(metric))
    return finish(figure, axes, spec, task, results, path)


def _draw_lambda(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Accuracy and cosine against lambda, logarithmic, with lambda = 0 set apart at the left."""
    rows = [
        row for arms in spec.series.values() for arm in arms for row in results.of(task.name, arm)
    ]
    positive = [row['lambda'] for row in rows if row.get('lambda')]
    if not positive:
        return False
    zero = min(positive) / 10
    panels = {**{m: metric_label(m) for m in task.metrics}, 'cosine': CURVES['cosine']}
    figure, axes = new_figure(len(panels))
    for one, (metric, label) in zip(axes, panels.items(), strict=True):
        if metric in task.metrics:
            draw_reference(one, results, task, spec, metric)
        for index, (series, arms) in enumerate(spec.series.items()):
            points = points_of(results, task, arms, metric, lambda row: row.get('lambda') or zero)
            dodge = 10 ** (0.04 * (index - (len(spec.series) - 1) / 2))
            placed = sorted((x * dodge, summary.mean, summary) for x, summary, _ in points)
            if placed:
                placed_at = [(x, summary) for x, _, summary in placed]
                draw_series(one, spec.look(series), series, placed_at)
        one.set_xscale('log')
        exponents = range(
            math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1
        )
        ticks = [10.0**exponent for exponent in exponents]
        one.set_xticks([zero, *ticks], ['0', *(f'{tick:g}' for tick in ticks)])
        one.minorticks_off()
        one.axvline(zero * math.sqrt(10), color='0.7', linewidth=0.8, linestyle=':')
        one.set_xlabel('λ')
        one.set_ylabel(label)
    return finish(figure, axes, spec, task, results, path)


def _draw_curves(spec: FigureSpec, task: Task, results: Results, path: Path) -> bool:
    """Cosine, SQNR and flip rate over the iterations: mean over seeds, with the deviation."""
    figure, axes = new_figure(len(CURVES))
    drawn = False
    for one, (key, label) in zip(axes, CURVES.items(), strict=True):
        scale = 100.0 if key == 'flip_rate' else 1.0
        for series, arms in spec.series.items():
            looks: dict[int, list[float]] = {}
            for arm in arms:
                for row in results.of(task.name, arm):
                    curves = row['curves']
                    for iteration, value in zip(curves['iter'], curves.get(key, []), strict=False):
                        if value is not None:
                            looks.setdefault(int(iteration), []).append(value * scale)
            if not looks:
                continue
            drawn = True
            iterations = sorted(looks)
            summaries = [summarize(looks[i]) for i in iterations]
            means = [summary.mean for summary in summaries]
            spread = [summary.deviation or 0.0 for summary in summaries]
            colour = COLOURS[spec.look(series) % len(COLOURS)]
            mark = 'o' if len(iterations) < 3 else ''
            one.plot(iterations, means, marker=mark, color=colour, linewidth=1.4, label=series)
            one.fill_between(
                iterations,
                [m - s for m, s in zip(means, spread, strict=True)],
                [m + s for m, s in zip(means, spread, strict=True)],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        one.set_xlabel('iteration')
        one.xaxis.get_major_locator().set_params(integer=True)
        one.set_ylabel(label)
        if key == 'flip_rate':
            one.set_ylim(bottom=0)
    return drawn and finish(figure, axes, spec, task, results, path)


DRAWERS: dict[str, Callable[[FigureSpec, Task, Results, Path], bool]] = {
    'size': _draw_size,
    'operations': _draw_operations,
    'bits': _draw_bits,
    'sparsity': _draw_sparsity,
    'lambda': _draw_lambda,
    'curves': _draw_curves,
}
