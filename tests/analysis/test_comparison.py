"""Tables, JSON and pictures of arms."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from slope_mm.analysis.comparison import (
    ArmResult,
    Detections,
    draw_detections,
    markdown_table,
    write_results,
)
from slope_mm.analysis.figures import ARM_COLOURS, draw_arms, draw_layers
from slope_mm.analysis.metrics import LayerMetrics, summary

ARMS = [
    ArmResult('fp32', 0.5, 0.4, None, None, 4_000_000, 1.0),
    ArmResult('naive', 0.25, 0.3, 0.9, 10.0, 400_000, 10.0),
    ArmResult('slope', 0.45, 0.38, 0.95, 12.5, 400_000, 10.0, 320_000),
]
ROWS = [
    LayerMetrics('stem', 'dense W8 A8', 0.99, 30.0, 0.01, 0.02),
    LayerMetrics('body', '2:4 W4 A4', 0.91, 8.0, 0.03, 0.0),
    LayerMetrics('exact', 'dense W8 A8', 1.0, float('inf'), 0.0, 0.0),
]


def test_the_table_has_a_row_an_arm_and_shares_of_the_first() -> None:
    lines = markdown_table(ARMS).splitlines()
    assert len(lines) == 2 + len(ARMS)
    assert {line.count('|') for line in lines} == {11}
    assert (
        '| naive | 0.250 | 0.300 | 50.0% / 75.0% | 0.9000 | 10.00 | 0.40 MB | 10.0x | – | – |'
        in lines
    )
    # The file's own length, and the dense size by it.
    assert lines[-1].endswith('| 0.40 MB | 10.0x | 320,000 bytes | 12.5x |')
    assert '| fp32 | 0.500 | 0.400 | 100.0% / 100.0% | – | – | 4.00 MB | 1.0x | – | – |' in lines


def test_a_base_without_any_accuracy_has_no_shares() -> None:
    nothing = ArmResult('fp32', 0.0, 0.0, None, None, 100, 1.0)
    assert '–' in markdown_table([nothing, ARMS[1]]).splitlines()[-1]


def test_results_are_written_for_people_and_for_programs(tmp_path: Path) -> None:
    write_results(ARMS, tmp_path, ['A note.'], {'seconds': {'train': 1.5}})
    assert markdown_table(ARMS) in (tmp_path / 'results.md').read_text()
    assert 'A note.' in (tmp_path / 'results.md').read_text()
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['arms'][1] == {
        'arm': 'naive',
        'bbox_mAP': 0.25,
        'segm_mAP': 0.3,
        'cosine': 0.9,
        'sqnr_db': 10.0,
        'bytes': 400_000,
        'ratio': 10.0,
        'file_bytes': None,
    }
    assert content['seconds'] == {'train': 1.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['results.json', 'results.md']


def test_a_summary_counts_every_layer_once_and_leaves_infinite_ratios_out() -> None:
    figures = summary(ROWS)
    assert figures['cosine_mean'] == pytest.approx((0.99 + 0.91 + 1.0) / 3)
    assert figures['cosine_worst'] == 0.91
    assert figures['sqnr_db'] == pytest.approx(19.0)


def colours_of(path: Path) -> set[tuple[int, ...]]:
    """The colours (RGB) that fill more than a thousandth of a picture."""
    image = cv2.imread(str(path))[:, :, ::-1]
    values, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, v)) for v, n in zip(values, counts, strict=True) if n > image.size / 3e3}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_layer_picture_shows_sparse_and_dense_layers_in_their_colours(tmp_path: Path) -> None:
    draw_layers(ROWS, tmp_path / 'layers.png', 'title')
    shown = colours_of(tmp_path / 'layers.png')
    assert {rgb(ARM_COLOURS[0]), rgb(ARM_COLOURS[1])} <= shown
    assert [path.name for path in tmp_path.iterdir()] == ['layers.png']


def test_the_arms_picture_is_as_wide_as_its_layers_need(tmp_path: Path) -> None:
    draw_arms({'naive': ROWS, 'slope': ROWS}, tmp_path / 'few.png')
    draw_arms({'naive': ROWS * 40, 'slope': ROWS * 40}, tmp_path / 'many.png')
    few, many = (cv2.imread(str(tmp_path / f'{name}.png')) for name in ('few', 'many'))
    assert few is not None and many is not None
    assert many.shape[1] > few.shape[1]


def test_detections_below_the_score_are_left_out(tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 255, np.uint8)
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:30, 20:50] = True
    box = np.array([[20.0, 10.0, 50.0, 30.0]])

    def found(score: float) -> Detections:
        return Detections(box, mask, np.array([0]), np.array([score]))

    for name, score in (('sure', 0.9), ('unsure', 0.2)):
        draw_detections([image], {'arm': [found(score)]}, ['circle'], tmp_path / f'{name}.png')
    painted = {
        name: int((cv2.imread(str(tmp_path / f'{name}.png')) < 250).any(2).sum())
        for name in ('sure', 'unsure')
    }
    assert painted['sure'] > 3 * painted['unsure'] > 0
