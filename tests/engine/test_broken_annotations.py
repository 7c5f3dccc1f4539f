"""COCO files with mistakes in them: what stock mmdet does, and one sentence where we come first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from slope_mm import DataError
from slope_mm.datasets.shapes import ShapesPaths
from slope_mm.engine.calibration import _item, evenly_spread_batches

Coco = dict[str, Any]


@pytest.fixture
def spoilt(
    shapes: ShapesPaths, tiny_config: Callable[..., Config], tmp_path: Path
) -> Callable[[Callable[[Coco, Path], Any]], Config]:
    """A config whose training data somebody has changed."""

    def make(spoil: Callable[[Coco, Path], Any]) -> Config:
        root = tmp_path / 'data'
        shutil.copytree(shapes.root, root)
        path = root / 'annotations' / 'train.json'
        coco = json.loads(path.read_text())
        spoil(coco, root)
        path.write_text(json.dumps(coco))
        config = tiny_config(tmp_path / 'run', validate=False)
        config.train_dataloader.dataset.data_root = f'{root}/'
        return config

    return make


def dataset_of(config: Config) -> Any:
    init_default_scope('mmdet')
    return DATASETS.build(config.train_dataloader.dataset)


def train(config: Config, folder: Path) -> int:
    return tiny.call_tool('train', tiny.dump(config, folder / 'config.py'))


def break_boxes_and_masks(coco: Coco, root: Path) -> None:
    """One mistake on each of the first annotations; the rest stays good."""
    boxes = ([5, 5, 0, 9], [5, 5, -3, 9], [900, 900, 9, 9], [5, 5, 0.5, 9], [-20, 5, 40, 9])
    annotations = coco['annotations']
    assert len(annotations) > 9
    for annotation, box in zip(annotations, boxes, strict=False):
        annotation['bbox'] = box
    annotations[5]['area'] = 0
    annotations[6]['category_id'] = 77
    annotations[7]['segmentation'] = [[1, 2, 3, 4]]


def test_broken_boxes_and_masks_are_left_out_as_in_stock(
    spoilt: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = spoilt(break_boxes_and_masks)
    whole = json.loads((tmp_path / 'data/annotations/train.json').read_text())['annotations']
    kept = sum(len(info['instances']) for info in map(dataset_of(config).get_data_info, range(8)))
    # Five boxes that are none (the one over the edge is one), an area and a class.
    assert len(whole) - kept == 6
    assert train(config, tmp_path) == 0, capsys.readouterr().err
    rows = tiny.read_losses(config.work_dir)
    assert len(rows) == 2


def test_a_missing_image_is_named(
    spoilt: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = []

    def remove(coco: Coco, root: Path) -> None:
        for image in coco['images']:
            removed.append(root / 'train' / image['file_name'])
            removed[-1].unlink()

    config = spoilt(remove)
    assert train(config, tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: calibration: '")
    assert any(str(path) in said for path in removed)
    assert 'FileNotFoundError' in said
    assert not list(Path(config.work_dir).glob('*.pth'))


def test_an_empty_mask_is_named_where_we_come_first(spoilt: Callable[..., Config]) -> None:
    """mmdet asks every instance for a mask."""

    def empty(coco: Coco, root: Path) -> None:
        for annotation in coco['annotations']:
            annotation['segmentation'] = []

    dataset = dataset_of(spoilt(empty))
    with pytest.raises(KeyError, match='mask'):
        dataset[0]
    with pytest.raises(DataError, match=r"train/.*' of the training data .* \(KeyError: 'mask'\)"):
        _item(dataset, 0)


def test_annotations_that_leave_nothing(spoilt: Callable[..., Config]) -> None:
    """mmengine builds no empty COCO set; one that comes from elsewhere is told so."""
    config = spoilt(lambda coco, root: coco.update(annotations=[]))
    with pytest.raises(ValueError, match='need at least one array'):
        dataset_of(config)

    class Loader:
        batch_size = 4
        dataset = ()

    with pytest.raises(DataError, match='the training data set is empty; check its annotation'):
        next(evenly_spread_batches(Loader(), 1))


def test_duplicate_ids_are_mmdets_affair(spoilt: Callable[..., Config], tmp_path: Path) -> None:
    """An annotation listed twice, the same with another image: mmdet's own words."""

    def repeat(coco: Coco, root: Path) -> None:
        coco['annotations'].append(dict(coco['annotations'][0]))

    with pytest.raises(AssertionError, match='are not unique'):
        dataset_of(spoilt(repeat))


def test_an_item_that_fails_without_a_word(tmp_path: Path) -> None:
    class Silent:
        def __getitem__(self, index: int) -> Any:
            raise KeyError

    with pytest.raises(DataError, match=r"'item 3' of the training data .* \(KeyError: no reason"):
        _item(Silent(), 3)
