"""The shapes data set: reproducible, correctly labelled, and never in anyone's way."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
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

from slope_mm.datasets import shape_scenes as scenes
from slope_mm.datasets import shapes
from slope_mm.datasets.shapes import (
    SHAPES_CLASSES,
    ShapesOptions,
    ShapesPaths,
    ensure_shapes,
    make_shapes,
    shapes_metainfo,
)
from slope_mm.errors import DataError

SMALL: dict[str, Any] = {
    'seed': 3,
    'num_train': 24,
    'num_val': 6,
    'image_size': (72, 96),
    'max_objects': 6,
    'object_size': (16, 48),
    'num_classes': 6,
}
TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    return make_shapes(tmp_path_factory.mktemp('shapes') / 'small', **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob('*')) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


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


# ---- what is there already -----------------------------------------------------------------------


def test_ensure_makes_once_and_then_leaves_alone(tmp_path: Path) -> None:
    options = {**SMALL, 'num_train': 2, 'num_val': 1}
    paths = ensure_shapes(tmp_path / 'deep' / 'set', **options)
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob('*')}
    # The same set in other words: a list for a pair.
    again = ensure_shapes(str(paths.root), **{**options, 'image_size': [72, 96]})
    assert again == paths
    assert {path: path.stat().st_mtime_ns for path in paths.root.rglob('*')} == before
    assert sorted(path.name for path in paths.root.parent.iterdir()) == ['set']


@pytest.mark.parametrize('make', [make_shapes, ensure_shapes])
def test_a_different_set_is_refused_with_a_remedy(
    small: ShapesPaths, make: Callable[..., ShapesPaths]
) -> None:
    before = contents(small.root)
    with pytest.raises(DataError) as caught:
        make(small.root, **{**SMALL, 'num_train': 25})
    message = str(caught.value)
    assert 'has num_train=24, asked for 25' in message
    assert 'num_val=' not in message
    assert str(small.root) in message
    assert '--force' in message
    assert '--train 25' in message
    assert contents(small.root) == before


def test_make_refuses_even_the_same_set(small: ShapesPaths) -> None:
    with pytest.raises(DataError, match='is the same shapes data set'):
        make_shapes(small.root, **SMALL)


@pytest.mark.parametrize('force', [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / 'thesis.txt').write_text('years of work')
    (tmp_path / 'meta.json').write_text('{"generator": "another program"}')
    before = contents(tmp_path)
    with pytest.raises(DataError, match='is not a shapes data set'):
        make_shapes(tmp_path, force=force, **SMALL)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    paths = make_shapes(tmp_path / 'empty', num_train=1, num_val=1)
    assert paths.meta.is_file()


def test_a_set_that_lost_a_part_is_not_taken_for_whole(tmp_path: Path) -> None:
    options = {**SMALL, 'num_train': 1, 'num_val': 1}
    paths = ensure_shapes(tmp_path / 'set', **options)
    paths.val_annotations.unlink()
    with pytest.raises(DataError, match=r'has lost annotations/val\.json'):
        ensure_shapes(paths.root, **options)


def test_an_older_generator_is_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ensure_shapes(tmp_path / 'set', num_train=1, num_val=1)
    monkeypatch.setattr(shapes, '_VERSION', shapes._VERSION + 1)
    with pytest.raises(DataError, match='was made by generator version'):
        ensure_shapes(paths.root, num_train=1, num_val=1)


def fail_at(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException) -> None:
    draw = shapes.draw_scene

    def interrupted(options: ShapesOptions, split: str, index: int) -> Any:
        if index == image:
            raise error
        return draw(options, split, index)

    monkeypatch.setattr(shapes, 'draw_scene', interrupted)


def test_an_interrupted_make_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / 'set', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_data_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, OSError(28, 'No space left on device'))
    with pytest.raises(DataError, match='No space left on device'):
        make_shapes(tmp_path / 'set', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=1, num_val=1)
    before = contents(paths.root)
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_shapes(paths.root, force=True, **SMALL)
    assert contents(paths.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_an_interruption_between_the_two_renames_keeps_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=1, num_val=1)
    before = contents(paths.root)
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == 'new':
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(paths.root, force=True, **SMALL)
    assert contents(paths.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_set_finished_by_another_process_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shapes._write_set
    root = tmp_path / 'set'

    def overtaken(paths: ShapesPaths, options: ShapesOptions) -> None:
        write(paths, options)
        write(ShapesPaths(root), options)

    monkeypatch.setattr(shapes, '_write_set', overtaken)
    ensure_shapes(root, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_place_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    # A folder below a file cannot be made by anyone, not even by root.
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match='cannot make the data set') as caught:
        ensure_shapes(tmp_path / 'file' / 'set', **SMALL)
    assert str(tmp_path / 'file' / 'set') in str(caught.value)


def test_a_file_in_the_way_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(DataError, match='is not a shapes data set'):
        make_shapes(tmp_path / 'file', force=True, **SMALL)
    assert (tmp_path / 'file').read_text() == 'mine'


# ---- bad options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_train': 0}, 'num_train must be 1 to 1000000, got 0'),
        ({'num_val': -1}, 'num_val'),
        ({'num_train': 2.5}, 'num_train must be an integer'),
        ({'num_train': True}, 'num_train must be an integer'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'image_size': -128}, 'image_size'),
        ({'image_size': (128, 0)}, 'image_size'),
        ({'image_size': (128, 128, 3)}, 'image_size must be a pair'),
        ({'image_size': '128'}, 'image_size must be a pair'),
        ({'image_size': 64}, 'objects of up to 72 px do not fit into images of 64x64'),
        ({'object_size': (10, 30)}, 'object_size'),
        ({'object_size': (50, 30)}, r'\(smallest, largest\)'),
        ({'object_size': (20, 200)}, 'do not fit'),
        ({'min_objects': 0}, 'min_objects'),
        ({'min_objects': 4, 'max_objects': 3}, 'max_objects must be at least 4'),
        ({'num_classes': 3}, 'num_classes must be 4 to 6, got 3'),
        ({'num_classes': 7}, 'num_classes'),
        ({'num_clases': 5}, 'unknown option num_clases; known are seed, num_train'),
    ],
)
@pytest.mark.parametrize('make', [make_shapes, ensure_shapes])
def test_bad_options(
    make: Callable[..., ShapesPaths], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path / 'set', **options)
    assert list(tmp_path.iterdir()) == []


def test_more_figures_than_an_image_can_hold(tmp_path: Path) -> None:
    crowded = {'min_objects': 40, 'max_objects': 40, 'object_size': (60, 72)}
    with pytest.raises(DataError, match=r'image train/0 has room for \d+ recognisable figures'):
        make_shapes(tmp_path / 'set', **crowded)
    assert list(tmp_path.iterdir()) == []


# ---- the tool ------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name='__main__')
        return int(caught.value.code or 0)

    return run


def test_the_tool_makes_keeps_refuses_and_remakes(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'set'
    options = ['--size', '64', '--object-size', '16', '40', '--train', '2', '--val', '1']
    assert tool(str(root), *options) == 0
    first = contents(root)
    assert tool(str(root), *options) == 0
    assert contents(root) == first
    capsys.readouterr()

    assert tool(str(root), *options, '--seed', '1') == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.count('\n') == 1
    assert printed.err.startswith('make_shapes: ')
    assert contents(root) == first

    # The command in the message is one that works.
    command = printed.err.split('`')[1].split()
    assert command[:2] == ['python', 'tools/make_shapes.py']
    assert tool(*command[2:]) == 0
    assert contents(root) != first
    assert ensure_shapes(root, seed=1, image_size=64, object_size=(16, 40), num_train=2, num_val=1)
