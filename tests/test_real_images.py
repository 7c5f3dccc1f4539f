"""The shipped configs on real images, where they lie beside the project; nothing depends on them.

Two iterations each: that they run end to end, not what they reach.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
from mmengine.config import Config

import slope_mm
from slope_mm.engine.launch import build_model, load_weights

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get('SLOPE_TEST_DATA', ROOT.parent / 'shared' / 'data'))


def needs(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there (SLOPE_TEST_DATA names another place for it)')
    return folder


def read(name: str, work_dir: Path, train: str, val: str, data: Path) -> Config:
    """A config on a few images of ``data``, without its start checkpoint."""
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    config.load_from = None
    config.work_dir = str(work_dir)
    config.merge_from_dict({'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1})
    for key, labels in (('train', train), ('val', val), ('test', val)):
        loader = config[f'{key}_dataloader']
        loader.merge({'num_workers': 0, 'persistent_workers': False, 'batch_size': 1})
        dataset = loader.dataset.get('dataset', loader.dataset)
        dataset.merge({'data_root': f'{data}/', 'indices': 2})
        if key != 'train':
            config[f'{key}_evaluator'].ann_file = str(data / labels)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.save_optimizer = False
    for hook in config.custom_hooks:
        if hook.type.endswith('CalibrationHook'):
            hook.batches = 1
    return tiny.name_run(config)


def check(run: tiny.Run) -> None:
    rows = [row for row in tiny.read_scalars(run.config.work_dir) if 'loss' in row]
    assert len(rows) == 2
    assert all(0 < row['loss'] < 100 and 0 < row['slope_cosine_mean'] < 1 for row in rows)
    model = build_model(run.config)
    load_weights(model, str(run.checkpoint))
    assert all(layer.calibrated for layer in slope_mm.compressed_layers(model).values())


def test_the_nuclei_config_trains_and_evaluates(tmp_path: Path) -> None:
    data = needs('nuclei')
    config = read(
        'mask_rcnn_r18_nuclei_slope_w4a4',
        tmp_path,
        'annotations/train.json',
        'annotations/val.json',
        data,
    )
    check(tiny.train(config))


def test_the_flagship_trains_and_evaluates_on_coco_images(tmp_path: Path) -> None:
    data = needs('coco_mini')
    config = read(
        'mask_rcnn_r50_slope_w4a4',
        tmp_path,
        'annotations/instances_train2017.json',
        'annotations/instances_val2017.json',
        data,
    )
    config.train_dataloader.dataset.dataset.pipeline[2].scale = [(160, 128), (160, 160)]
    for loader in (config.val_dataloader, config.test_dataloader):
        loader.dataset.pipeline[1].scale = (160, 160)
    check(tiny.train(config))
