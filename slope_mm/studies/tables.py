"""Results as markdown: mean and spread, paired differences with intervals, what did not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slope_mm.studies.results import Results
from slope_mm.studies.statistics import Difference, Summary, paired_difference, summarize
from slope_mm.studies.study import Comparison, Study, Table, Task

NOTHING = '–'
LABELS = {'box_mAP': 'box mAP', 'mask_mAP': 'mask mAP', 'top1': 'top-1 (%)'}
MARK = '†'
LOSS = 'loss'
DIGITS = {'top1': 1, LOSS: 4}


def metric_label(name: str) -> str:
    """How tables and figures call a metric."""
    return LABELS.get(name, name)


def markdown(study: Study, results: Results) -> str:
    """The whole ``results.md``."""
    lines = [f'# {study.title}', '']
    if study.not_run:
        lines += [study.not_run, '']
    for task in study.tasks:
        lines += _task(study, task, results)
    if study.interplay is not None:
        lines += _interplay(results)
    if results.failed:
        lines += ['## Failed', '', '| task | arm | seed | last error |', '|---|---|---|---|']
        for item in results.failed:
            error = str(item['error']).replace('|', '\\|')
            lines.append(f'| {item["task"]} | {item["arm"]} | {item["seed"]} | {error} |')
        lines.append('')
    lines += _conditions(results)
    return '\n'.join(lines).rstrip() + '\n'


def _task(study: Study, task: Task, results: Results) -> list[str]:
    lines = [f'## {task.title}', '']
    reasons = [item['reason'] for item in results.skipped if item['task'] == task.name]
    rows = [row for row in results.rows if row['task'] == task.name]
    if not rows:
        return [*lines, f'Not run: {reasons[0] if reasons else "no trial has finished"}.', '']
    for start in results.starts:
        if start['task'] == task.name:
            figures = ', '.join(
                f'{metric_label(name)} {_number(name, start[name])}' for name in task.metrics
            )
            lines += [f'Dense start (seed {start["seed"]}): {figures}.', '']
    for table in study.tables:
        if isinstance(table, Comparison):
            drawn = comparison_lines(table, task, results)
        else:
            drawn = table_lines(study, table, task, results)
        if drawn:
            lines += [*([f'### {table.title}', ''] if table.title else []), *drawn, '']
    return lines + threshold_lines(study, task, results)


def table_lines(study: Study, table: Table, task: Task, results: Results) -> list[str]:
    """One table on one task; nothing if none of its arms belongs to the task."""
    arms = [name for name in table.arms if study.seeds(task, study.arm(name))]
    if not arms:
        return []
    metrics = list(task.metrics)
    header = ['arm', 'seeds', *(metric_label(m) for m in metrics)]
    if table.reference is not None:
        names = ' / '.join(metric_label(m) for m in metrics)
        header.append(f'of {table.reference} (%), {names}')
    header += [f'Δ {metric_label(m)} against {table.against}, 95 %' for m in metrics]
    header += ['training loss', 'flips (%)']
    header += ['cosine', 'SQNR (dB)', 'size (MB)', 'ratio', 'GBOPs']
    lines = [_row(header), '|' + '---|' * len(header)]
    marked = False
    for name in arms:
        rows = results.of(task.name, name)
        other = _differs(rows, results.of(task.name, table.against))
        marked |= other
        cells = [name + (f' {MARK}' if other else ''), _seeds(study, task, name, rows)]
        cells += [_spread(m, results.by_seed(task.name, name, m)) for m in metrics]
        if table.reference is not None:
            cells.append(_shares(metrics, task, name, table.reference, results))
        for m in metrics:
            base = results.by_seed(task.name, table.against, m)
            same = name == table.against
            difference = None
            if not same:
                difference = paired_difference(results.by_seed(task.name, name, m), base)
            cells.append(_difference(m, difference))
        cells += [_loss(results.training_loss(task.name, name)), _flips(rows)]
        cells += _model_cells(rows)
        lines.append(_row(cells))
    if marked:
        lines += [
            '',
            f'{MARK} start, schedule, optimizer or data differ from those of {table.against}.',
        ]
    return lines + start_lines(task, arms, results)


def comparison_lines(table: Comparison, task: Task, results: Results) -> list[str]:
    """Paired differences alone; pairs without a common seed are left out."""
    metrics = list(task.metrics)
    header = ['arm', 'against', 'seeds', *(f'Δ {metric_label(m)}, 95 %' for m in metrics)]
    header.append('Δ training loss, 95 %')
    lines = []
    marked = False
    for arm, base in table.pairs:
        found = [
            paired_difference(
                results.by_seed(task.name, arm, m), results.by_seed(task.name, base, m)
            )
            for m in metrics
        ]
        counts = [difference.n for difference in found if difference is not None]
        if not counts:
            continue
        other = _differs(results.of(task.name, arm), results.of(task.name, base))
        marked |= other
        cells = [_difference(m, d) for m, d in zip(metrics, found, strict=True)]
        losses = [results.training_loss(task.name, name) for name in (arm, base)]
        cells.append(_difference(LOSS, paired_difference(*losses)))
        lines.append(_row([arm + (f' {MARK}' if other else ''), base, str(counts[0]), *cells]))
    if not lines:
        return []
    note = ['', f'{MARK} start, schedule, optimizer or data differ.'] if marked else []
    arms = list(dict.fromkeys(name for pair in table.pairs for name in pair))
    note += start_lines(task, arms, results)
    return [_row(header), '|' + '---|' * len(header), *lines, *note]


def start_lines(task: Task, arms: Sequence[str], results: Results) -> list[str]:
    """One line if rows of a table that should share a start began from different weights.

    Each seed is looked at by itself where each has a start of its own. Rows that do not say what
    they began from are left out.
    """
    per_seed = task.start is not None and task.start.per_seed
    found: dict[int | None, dict[str, dict[str, list[int]]]] = {}
    for name in arms:
        for row in results.of(task.name, name):
            if digest := row.get('start_digest'):
                group = found.setdefault(row['seed'] if per_seed else None, {})
                group.setdefault(digest, {}).setdefault(name, []).append(row['seed'])
    groups = [
        f'{digest} under '
        + ', '.join(f'{name} ({", ".join(map(str, seeds))})' for name, seeds in by_arm.items())
        for by_digest in found.values()
        if len(by_digest) > 1
        for digest, by_arm in by_digest.items()
    ]
    if not groups:
        return []
    return ['', f'The weights of the starts differ, by arm and (seeds): {"; ".join(groups)}.']


def threshold_lines(study: Study, task: Task, results: Results) -> list[str]:
    """Measured accuracy of combinations against the one at which the single losses add up.

    The threshold is ``sparse + quantized - dense``, seed by seed; below it the combination loses
    more than both alone.
    """
    metrics = list(task.metrics)
    header = ['combination']
    for metric in metrics:
        header += [f'{metric_label(metric)}: losses added', 'measured', 'difference, 95 %']
    lines: list[str] = []
    for threshold in study.thresholds:
        for name in threshold.combined:
            cells = [name]
            for metric in metrics:
                own, dense, sparse, quantized = (
                    results.by_seed(task.name, arm, metric)
                    for arm in (name, threshold.dense, threshold.sparse, threshold.quantized)
                )
                common = own.keys() & dense.keys() & sparse.keys() & quantized.keys()
                added = {s: sparse[s] + quantized[s] - dense[s] for s in common}
                measured = {s: own[s] for s in common}
                cells += [_spread(metric, added), _spread(metric, measured)]
                cells.append(_difference(metric, paired_difference(measured, added)))
            lines.append(_row(cells))
    if not lines:
        return []
    return [
        *('### Do the losses of sparsity and quantization add up?', ''),
        *(_row(header), '|' + '---|' * len(header), *lines, ''),
        'Losses added: sparse + quantized − dense (arXiv 2405.20935’s orthogonality threshold);'
        ' a negative difference is a loss beyond it.',
        '',
    ]


def _differs(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows of the same seeds had another start, schedule, optimizer or data."""
    schedules = {row['seed']: row['schedule_hash'] for row in base}
    return any(
        row['seed'] in schedules and schedules[row['seed']] != row['schedule_hash'] for row in rows
    )


def _row(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def _seeds(study: Study, task: Task, name: str, rows: Sequence[Any]) -> str:
    wanted = len(study.seeds(task, study.arm(name)))
    return str(len(rows)) if len(rows) == wanted else f'{len(rows)} of {wanted}'


def _number(metric: str, value: float) -> str:
    return f'{value:.{DIGITS.get(metric, 3)}f}'


def _spread(metric: str, values: Mapping[int, float]) -> str:
    if not values:
        return NOTHING
    summary = summarize(list(values.values()))
    text = _number(metric, summary.mean)
    return text if summary.deviation is None else f'{text} ± {_number(metric, summary.deviation)}'


def _shares(metrics: Sequence[str], task: Task, name: str, reference: str, results: Results) -> str:
    """Means in percent of the reference's means, over the seeds that both have."""
    texts = []
    for metric in metrics:
        own = results.by_seed(task.name, name, metric)
        base = results.by_seed(task.name, reference, metric)
        common = own.keys() & base.keys()
        total = sum(base[seed] for seed in common)
        texts.append(f'{100 * sum(own[s] for s in common) / total:.1f}' if total > 0 else NOTHING)
    return ' / '.join(texts)


def _difference(metric: str, difference: Difference | None) -> str:
    """``+0.012 ± 0.005 *``: the star says that the interval excludes zero."""
    if difference is None:
        return NOTHING
    sign = '−' if difference.mean < 0 else '+'
    text = f'{sign}{_number(metric, abs(difference.mean))}'
    if difference.half_width is None:
        return text
    star = ' *' if difference.decided else ''
    return f'{text} ± {_number(metric, difference.half_width)}{star}'


def _loss(values: Mapping[int, float]) -> str:
    return f'{summarize(list(values.values())).mean:.4f}' if values else NOTHING


def _flips(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mask entries that changed between two looks, mean over looks and seeds, in percent."""
    rates = [row.get('curves', {}).get('flip_rate') or [] for row in rows]
    found = [rate for looks in rates for rate in looks if rate is not None]
    return f'{100 * sum(found) / len(found):.2f}' if found else NOTHING


def _model_cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(key: str) -> Summary | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return summarize(values) if values else None

    cosine, sqnr, size, bops = (mean(key) for key in ('cosine', 'sqnr_db', 'bytes', 'gbops'))
    dense = mean('dense_bytes')
    megabytes = NOTHING if size is None else f'{size.mean / 1e6:.2f}'
    if any(row.get('bytes_from') == 'calculated' for row in rows):
        megabytes += ' (calc.)'
    return [
        NOTHING if cosine is None else f'{cosine.mean:.4f}',
        NOTHING if sqnr is None else f'{sqnr.mean:.2f}',
        megabytes,
        NOTHING if size is None or dense is None else f'{dense.mean / size.mean:.1f}x',
        NOTHING if bops is None else f'{bops.mean:.4g}',
    ]


def _interplay(results: Results) -> list[str]:
    lines = ['## Weight errors of each alone and of both, on the dense start', '']
    if not results.interplay:
        return [*lines, 'Not measured: no start is there.', '']
    header = (
        'task',
        'pattern',
        'bits',
        'layers',
        'sparse',
        'quantized',
        'sum',
        'S→Q',
        'Q→S',
        'S→Q / sum, worst layer',
        'layers with S→Q > sum',
        'layers with Q→S > S→Q',
    )
    lines += [_row(header), '|' + '---|' * len(header)]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for item in results.interplay:
        groups.setdefault((item['task'], item['sparsity'], item['bits']), []).append(item)
    for (task, sparsity, bits), items in groups.items():
        mean = {
            key: sum(item[key] for item in items) / len(items)
            for key in ('sparse', 'quantized', 's_then_q', 'q_then_s')
        }
        excess = [item['s_then_q'] / (item['sparse'] + item['quantized']) for item in items]
        lines.append(
            _row(
                [
                    *(task, sparsity, str(bits), str(len(items))),
                    *(f'{mean[key]:.4f}' for key in ('sparse', 'quantized')),
                    f'{mean["sparse"] + mean["quantized"]:.4f}',
                    *(f'{mean[key]:.4f}' for key in ('s_then_q', 'q_then_s')),
                    f'{max(excess):.3f}',
                    str(sum(value > 1 for value in excess)),
                    str(sum(item['q_then_s'] > item['s_then_q'] for item in items)),
                ]
            )
        )
    note = 'Errors are ‖w − ŵ‖ / ‖w‖, means over layers; layers that stay dense are left out.'
    return [*lines, '', note, '']


def _conditions(results: Results) -> list[str]:
    """Machine, versions and time, as far as the rows agree on them."""
    if not results.rows:
        return []
    rows = [*results.rows, *results.starts]
    machines = sorted({_machine(row['machine']) for row in rows})
    kept = sorted({_versions(row['versions']) for row in rows})
    starts = {row['config_hash']: row['wall_s'] for row in results.starts}
    # By the clock: whatever else ran beside them is in it.
    # Equal arms are one run.
    trials = {row['config_hash']: row['wall_s'] for row in results.rows}
    hours = (sum(trials.values()) + sum(starts.values())) / 3600
    return [
        '## Conditions',
        '',
        'Mean ± standard deviation over seeds; differences are means over the same seeds with'
        ' Student’s 95 % interval, and * marks those whose interval excludes zero. Sizes marked'
        ' (calc.) are calculated, all others are lengths of files. Training loss: at the last'
        ' look, without the regularizer. Flips: mask entries that changed from one look to the'
        ' next, mean over looks. GBOPs: of one test image.',
        '',
        *(f'- {text}' for text in machines),
        *(f'- {text}' for text in kept),
        f'- {len(trials)} trials and {len(starts)} starts took {hours:.1f} hours by'
        ' the clock, whatever ran beside them.',
        '',
    ]


def _machine(facts: Mapping[str, Any]) -> str:
    gpus = ', '.join(facts['gpus']) or 'no GPU'
    processes = facts['processes']
    return (
        f'{facts["system"]}, {facts["processor"]}, {facts["cores"]} cores, {gpus};'
        f' {processes} process{"es" if processes > 1 else ""} a trial, {facts["threads"]} thread'
        f'{"s" if facts["threads"] > 1 else ""} each'
    )


def _versions(facts: Mapping[str, str]) -> str:
    return ', '.join(f'{name} {version}' for name, version in facts.items())
