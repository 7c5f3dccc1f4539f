"""results.json, tables and figures: what stands in them, and that they can be drawn again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import pytest
from matplotlib.figure import Figure
from synthetic import synthetic_results

from slope_mm.errors import DataError
from slope_mm.studies.figures import draw_figures
from slope_mm.studies.panels import COLOURS, draw_legend
from slope_mm.studies.results import Results, read_results
from slope_mm.studies.statistics import paired_difference, summarize
from slope_mm.studies.study import Study
from slope_mm.studies.study_file import read_study
from slope_mm.studies.tables import markdown

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='module')
def study() -> Study:
    return read_study(ROOT / 'configs/studies/1_regularizers.py')


def cells(text: str, heading: str, arm: str) -> list[str]:
    """The cells of an arm's row in the first table below a heading."""
    part = text[text.index(heading) :]
    row = next(line for line in part.splitlines() if line.startswith(f'| {arm} |'))
    return [cell.strip() for cell in row.strip('|').split('|')]


def test_results_survive_the_file(study: Study, tmp_path: Path) -> None:
    results = synthetic_results(study)
    results.failed.append({'task': 'shapes', 'arm': 'fp32', 'seed': 9, 'error': 'no'})
    results.write(tmp_path)
    assert read_results(tmp_path, study) == results
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['study'] == study.name
    wanted = {'arm', 'seed', 'box_mAP', 'mask_mAP', 'config_hash', 'versions', 'machine', 'wall_s'}
    assert all(wanted <= row.keys() for row in content['rows'])
    assert [path.name for path in tmp_path.iterdir()] == ['results.json']


def test_results_of_another_study_are_not_taken(study: Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='without --report-only'):
        read_results(tmp_path, study)
    Results('other').write(tmp_path)
    with pytest.raises(DataError, match="study 'other'"):
        read_results(tmp_path, study)
    (tmp_path / 'results.json').write_text('{"study": "1_regul')
    with pytest.raises(DataError, match='cannot be read'):
        read_results(tmp_path, study)


def test_a_table_says_what_the_rows_say(study: Study) -> None:
    results = synthetic_results(study)
    text = markdown(study, results)
    own = results.by_seed('shapes', 'SLOPE 2:4 W2', 'box_mAP')
    base = results.by_seed('shapes', 'naive 2:4 W2', 'box_mAP')
    fp32 = results.by_seed('shapes', 'fp32', 'box_mAP')
    summary, difference = summarize(list(own.values())), paired_difference(own, base)
    row = cells(text, '2:4 + 2 bit (table 7)', 'SLOPE 2:4 W2')
    assert row[1] == '5'
    assert row[2] == f'{summary.mean:.3f} ± {summary.deviation:.3f}'
    share = 100 * sum(own.values()) / sum(fp32.values())
    assert row[4].split(' / ')[0] == f'{share:.1f}'
    numbers = [float(n) for n in re.findall(r'[\d.]+', row[5])]
    assert numbers == pytest.approx([abs(difference.mean), difference.half_width], abs=6e-4)
    assert ('*' in row[5]) == difference.decided
    assert row[11].endswith('(calc.)')
    assert cells(text, '2:4 + 2 bit (table 7)', 'naive 2:4 W2')[5] == '–'


def test_equal_arms_are_counted_as_the_one_run_that_they_are(study: Study) -> None:
    results = synthetic_results(study)
    one, other, *_ = results.rows
    results.rows[:] = [one, {**one, 'arm': other['arm']}]
    assert '- 1 trials and 0 starts took 0.0 hours' in markdown(study, results)
    results.rows[1]['config_hash'] = 'another'
    assert '- 2 trials and 0 starts took 0.1 hours' in markdown(study, results)


def test_training_losses_and_flips_are_those_of_the_curves(study: Study) -> None:
    results = synthetic_results(study)
    for row in results.rows:
        losses = row['curves']['loss']
        losses[-1] = 0.5 + 0.01 * row['seed'] * (row['arm'] == 'SLOPE 2:4 W2')
        if 'flip_rate' in row['curves']:
            row['curves']['flip_rate'] = [None, 0.01, 0.03]
    text = markdown(study, results)
    row = cells(text, '2:4 + 2 bit (table 7)', 'SLOPE 2:4 W2')
    assert row[7:9] == ['0.5200', '2.00']
    assert cells(text, '2:4 + 2 bit (table 7)', 'naive 2:4 W2')[7:9] == ['0.5000', '2.00']
    # Differences of 0, 0.01 … 0.04: Student's t of 4 degrees of freedom is 2.776.
    pair = cells(text, 'The order of the paper', 'SLOPE 2:4 W2')
    half = 2.776 * (0.00025 / 5) ** 0.5
    assert pair[-1] == f'+0.0200 ± {half:.4f} *'


def test_a_training_that_ended_in_no_number_does_not_end_the_report(study: Study) -> None:
    results = synthetic_results(study)
    for row in results.rows:
        if (row['arm'], row['seed']) == ('SLOPE 2:4 W2', 1):
            row['curves']['loss'][-1] = None
    assert sorted(results.training_loss('shapes', 'SLOPE 2:4 W2')) == [0, 2, 3, 4]
    row = cells(markdown(study, results), '2:4 + 2 bit (table 7)', 'SLOPE 2:4 W2')
    assert row[1] == '5' and float(row[7]) > 0


def test_what_is_missing_is_said(study: Study) -> None:
    results = synthetic_results(study)
    results.rows = [
        row
        for row in results.rows
        if row['task'] == 'shapes' and (row['arm'], row['seed']) != ('fp32', 4)
    ]
    results.skipped = [{'task': 'nuclei', 'reason': 'there is no such data'}]
    results.failed = [{'task': 'shapes', 'arm': 'fp32', 'seed': 4, 'error': 'RuntimeError: a | b'}]
    text = markdown(study, results)
    assert cells(text, 'Detection, W4', 'fp32')[1] == '4 of 5'
    assert 'Not run: there is no such data.' in text
    assert '| shapes | fp32 | 4 | RuntimeError: a \\| b |' in text


def test_an_arm_of_another_schedule_is_marked(study: Study) -> None:
    results = synthetic_results(study)
    for row in results.rows:
        if row['arm'] == 'L2 2:4 W4':
            row['schedule_hash'] = 'another'
    text = markdown(study, results)
    marked = cells(text, '2:4 + 4 bit (table 7)', 'L2 2:4 W4 †')
    assert marked[1] == '5'
    assert '† start, schedule, optimizer or data differ' in text


def test_losses_are_added_as_the_threshold_says() -> None:
    study = read_study(ROOT / 'configs/studies/4_order.py')
    results, task = synthetic_results(study), study.tasks[0].name
    text = markdown(study, results)

    def mean(arm: str) -> float:
        return summarize(list(results.by_seed(task, arm, 'box_mAP').values())).mean

    row = cells(text, 'add up?', 'Q→S 2:4 W2')
    added = mean('2:4') + mean('W2') - mean('fp32')
    assert float(row[1].split(' ± ')[0]) == pytest.approx(added, abs=6e-4)
    assert float(row[2].split(' ± ')[0]) == pytest.approx(mean('Q→S 2:4 W2'), abs=6e-4)


def test_every_figure_is_drawn_where_there_are_rows(study: Study, tmp_path: Path) -> None:
    results = synthetic_results(study)
    results.rows = [row for row in results.rows if row['task'] == 'shapes']
    written = draw_figures(study, results, tmp_path)
    assert {path.name for path in written} == {f'{f.name}_shapes.png' for f in study.figures}
    for path in written:
        image = cv2.imread(str(path))
        assert (image < 200).any(2).sum() > 2000, 'a picture is more than white'


def test_a_label_has_one_colour_in_all_pictures_of_a_study(tmp_path: Path) -> None:
    study = read_study(ROOT / 'configs/studies/1_regularizers.py')
    results = synthetic_results(study)
    results.rows = [row for row in results.rows if row['arm'].startswith('SLOPE')]
    written = draw_figures(study, results, tmp_path)
    assert {path.name.partition('_')[0] for path in written} == {'size', 'bits', 'curves'}
    for path in written:
        image = cv2.imread(str(path)).astype(int)
        counts = [
            int((abs(image - [int(colour[i : i + 2], 16) for i in (5, 3, 1)]) < 8).all(2).sum())
            for colour in COLOURS[:6]
        ]
        # Of dense, naive, L2, SLOPE in the order of the first picture.
        assert counts.index(max(counts)) == 3, (path.name, counts)


def test_a_lambda_curve_and_a_pattern_axis_are_drawn(tmp_path: Path) -> None:
    for name, figures in (('2_lambda', 6), ('3_sparsity_and_bits', 4)):
        study = read_study(ROOT / f'configs/studies/{name}.py')
        assert len(draw_figures(study, synthetic_results(study), tmp_path / name)) == figures


def test_a_study_without_rows_has_a_report_and_no_figures(study: Study, tmp_path: Path) -> None:
    assert draw_figures(study, Results(study.name), tmp_path) == []
    assert 'no trial has finished' in markdown(study, Results(study.name))


COMMITTED = sorted((ROOT / 'docs' / 'results').glob('*/results.json'))


def test_a_committed_table_is_what_its_results_give() -> None:
    if not COMMITTED:
        pytest.skip('no results are committed under docs/results')
    for path in COMMITTED:
        name = json.loads(path.read_text())['study']
        quick = name.endswith('_quick')
        study = read_study(ROOT / f'configs/studies/{name.removesuffix("_quick")}.py', quick)
        drawn = markdown(study, read_results(path.parent, study))
        assert (path.parent / 'results.md').read_text() == drawn, path


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of all markdown tables: what stands under which heading."""
    rows, headings = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            headings = []
        elif not headings:
            headings = cells
        elif set(line) - set('|-'):
            rows.append(dict(zip(headings, cells, strict=True)))
    return rows


def test_the_readme_shows_rows_of_a_committed_table() -> None:
    committed = rows_of((ROOT / 'docs/results/regularizers/results.md').read_text())
    shown = [row for row in rows_of((ROOT / 'README.md').read_text()) if 'seeds' in row]
    assert len(shown) >= 6
    for row in shown:
        assert any(row.items() <= whole.items() for whole in committed), row


def test_a_legend_is_no_wider_than_its_picture() -> None:
    figure = Figure(figsize=(9.2, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    (line,) = axes[0].plot([0, 1])
    labels = [f'a treatment with a long name, number {i}' for i in range(7)]
    draw_legend(figure, dict.fromkeys(labels, line), 6)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert legend.get_window_extent().width <= figure.bbox.width
