"""The shapes data set: reproducible and correctly labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_shapes import SMALL, contents

from slope_mm.datasets import shape_scenes as scenes
from slope_mm.datasets.shapes import (
    SHAPES_CLASSES,
    ShapesOptions,
    ShapesPaths,
    make_shapes,
    shapes_metainfo,
)


def instances(annotations: Path) -> list[dict[str, Any]]:
    return json.loads(annotations.read_text())['annotations']


def decode_slowly(rle: dict[str, Any]) -> np.ndarray:
    """COCO's compressed RLE, decoded from its description: no pycocotools."""
    runs: list[int] = []
    text, position = rle['counts'], 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            chunk = ord(text[position]) - 48
            position += 1
            value |= (chunk & 0x1F) << shift
            shift += 5
            more = bool(chunk & 0x20)
            if not more and chunk & 0x10:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    flat = [index % 2 for index, run in enumerate(runs) for _ in range(run)]
    height, width = rle['size']
    return np.array(flat, bool).reshape(width, height).T


# ---- reproducible --------------------------------------------------------------------------------


def test_same_options_give_the_same_bytes(small: ShapesPaths, tmp_path: Path) -> None:
    again = make_shapes(tmp_path / 'again', **SMALL)
    assert contents(again.root) == contents(small.root)
    assert len(contents(small.root)) == 24 + 6 + 3


def test_another_seed_gives_other_images(small: ShapesPaths, tmp_path: Path) -> None:
    other = make_shapes(tmp_path / 'other', **{**SMALL, 'seed': 4})
    before, after = contents(small.root), contents(other.root)
    assert all(before[name] != after[name] for name in before if name.endswith('.png'))


def test_train_and_val_share_no_image(small: ShapesPaths) -> None:
    files = contents(small.root)
    images = [data for name, data in files.items() if name.endswith('.png')]
    assert len(set(images)) == len(images)


def test_a_larger_set_begins_with_the_smaller_one(small: ShapesPaths, tmp_path: Path) -> None:
    grown = make_shapes(tmp_path / 'grown', **{**SMALL, 'num_train': 30, 'num_val': 7})
    before, after = contents(small.root), contents(grown.root)
    for name in before:
        if name.endswith('.png'):
            assert before[name] == after[name]
    for split in ('train', 'val'):
        old = json.loads(before[f'annotations/{split}.json'])
        new = json.loads(after[f'annotations/{split}.json'])
        for key in ('images', 'annotations'):
            assert len(new[key]) > len(old[key])
            assert new[key][: len(old[key])] == old[key]


# ---- labels --------------------------------------------------------------------------------------


def test_images_have_the_size_that_was_asked_for(small: ShapesPaths) -> None:
    coco = json.loads(small.train_annotations.read_text())
    for entry in coco['images']:
        image = cv2.imread(str(small.train_images / entry['file_name']))
        assert image.shape == (72, 96, 3)
        assert (entry['height'], entry['width']) == (72, 96)


def test_area_and_box_are_those_of_the_mask(small: ShapesPaths) -> None:
    for instance in instances(small.train_annotations):
        rle = instance['segmentation']
        assert isinstance(rle['counts'], str)
        mask = decode_slowly(rle)
        assert np.array_equal(mask, mask_utils.decode(rle).astype(bool))
        pixels = [(x, y) for y in range(72) for x in range(96) if mask[y, x]]
        columns, rows = zip(*pixels, strict=True)
        box = [min(columns), min(rows), max(columns) - min(columns) + 1, max(rows) - min(rows) + 1]
        assert instance['area'] == len(pixels)
        assert instance['bbox'] == box
        assert instance['iscrowd'] == 0


def test_masks_of_one_image_are_disjoint(small: ShapesPaths) -> None:
    total: dict[int, np.ndarray] = {}
    for instance in instances(small.train_annotations):
        mask = decode_slowly(instance['segmentation']).astype(int)
        total[instance['image_id']] = total.get(instance['image_id'], 0) + mask
    assert len(total) == 24
    assert all(count.max() == 1 for count in total.values())


def test_counts_and_categories(small: ShapesPaths) -> None:
    coco = json.loads(small.train_annotations.read_text())
    assert [c['id'] for c in coco['categories']] == [1, 2, 3, 4, 5, 6]
    assert tuple(c['name'] for c in coco['categories']) == shapes_metainfo(6)['classes']
    assert {a['category_id'] for a in coco['annotations']} == {1, 2, 3, 4, 5, 6}
    assert len({a['id'] for a in coco['annotations']}) == len(coco['annotations'])
    per_image = np.bincount([a['image_id'] for a in coco['annotations']], minlength=25)[1:]
    assert per_image.min() >= 1
    assert per_image.max() <= 6
    assert len(set(per_image)) > 2


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    index=st.integers(0, 10**6 - 1),
    height=st.integers(48, 120),
    width=st.integers(48, 120),
    objects=st.integers(1, 8),
)
def test_any_scene_is_labelled_as_drawn(
    seed: int, index: int, height: int, width: int, objects: int
) -> None:
    options = ShapesOptions.of(
        seed=seed, image_size=(height, width), max_objects=objects, object_size=(12, 48)
    )
    scene = scenes.draw_scene(options, 'val', index)
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert 1 <= len(scene.figures) <= objects
    covered = np.zeros((height, width), int)
    for figure in scene.figures:
        covered += figure.visible
        visible = np.count_nonzero(figure.visible)
        assert 24 <= visible <= figure.whole_area
        assert visible >= 0.4 * figure.whole_area
    assert covered.max() == 1


def test_later_figures_really_cover_earlier_ones() -> None:
    options = ShapesOptions()
    shares = []
    for index in range(30):
        for figure in scenes.draw_scene(options, 'train', index).figures:
            shares.append(np.count_nonzero(figure.visible) / figure.whole_area)
    assert np.mean(np.array(shares) < 0.9) > 0.15
    assert min(shares) < 0.6
    assert np.mean(np.array(shares) == 1.0) > 0.3


def test_mask_pixels_wear_the_colour_of_their_figure() -> None:
    """Inside a mask the image is nearer to its figure's colour than to any other figure's."""
    right = total = 0
    for index in range(20):
        scene = scenes.draw_scene(ShapesOptions(), 'train', index)
        colours = np.array([figure.colour for figure in scene.figures])
        for number, figure in enumerate(scene.figures):
            pixels = scene.image[figure.visible].astype(float)
            nearest = np.linalg.norm(pixels[:, None] - colours, axis=2).argmin(axis=1)
            right += np.count_nonzero(nearest == number)
            total += len(pixels)
    assert right / total > 0.95


# Share of the circle around the figure that an unstretched figure fills, by plane geometry.
FILL = {
    'circle': 1.0,
    'triangle': 3 * np.sqrt(3) / 4 / np.pi,
    'square': 2 / np.pi,
    'star': 10 * 0.45 * np.sin(np.pi / 5) / 2 / np.pi,
    'cross': (8 * 0.3 * np.sqrt(1 - 0.3**2) - 4 * 0.3**2) / np.pi,
    'ring': 1 - 0.55**2,
}


@pytest.mark.parametrize('name', SHAPES_CLASSES)
@pytest.mark.parametrize('radius', [15.0, 40.0])
def test_figures_have_the_area_of_their_geometry(name: str, radius: float) -> None:
    outline = [curve * radius + (50.3, 49.6) for curve in scenes._OUTLINES[name]()]
    coverage, whole_area = scenes._rasterise(outline, (100, 100))
    expected = FILL[name] * np.pi * radius**2
    # OpenCV also fills the sub-pixels that an edge runs through: an eighth of a pixel on each side.
    assert whole_area == pytest.approx(expected, rel=2.5 / radius)
    assert coverage.sum() == pytest.approx(expected, rel=2.5 / radius)
    assert np.count_nonzero(coverage >= 0.5) == whole_area
    rows, columns = np.nonzero(coverage)
    assert columns.min() >= 50.3 - radius - 1
    assert columns.max() <= 50.3 + radius + 1
    assert rows.min() >= 49.6 - radius - 1
    assert rows.max() <= 49.6 + radius + 1


def test_the_border_cuts_the_mask_not_the_whole_area() -> None:
    outline = [curve * 20 + (0.0, 50.0) for curve in scenes._OUTLINES['circle']()]
    coverage, whole_area = scenes._rasterise(outline, (100, 100))
    assert np.count_nonzero(coverage >= 0.5) == pytest.approx(whole_area / 2, rel=0.05)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_coco_scores_perfect_predictions_with_one(small: ShapesPaths, kind: str) -> None:
    truth = COCO(str(small.val_annotations))
    predictions = [{**instance, 'score': 1.0} for instance in instances(small.val_annotations)]
    evaluation = COCOeval(truth, truth.loadRes(predictions), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
