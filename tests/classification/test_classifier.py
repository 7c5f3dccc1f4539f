"""slope_mm's own classifier: images in folders, loss, accuracy, a run from training to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope

import slope_mm
from slope_mm.engine.launch import build_model
from slope_mm.errors import ConfigError, DataError

CONFIGS = tiny.ROOT / 'configs' / 'classification'
SLOPE = 'resnet_tiny_sign_digits_slope_w2'


def small_config(images: Path, work_dir: Path, name: str = SLOPE, **options: Any) -> Config:
    """A config of ``configs/classification`` on a few images, one epoch of two iterations."""
    config = Config.fromfile(CONFIGS / f'{name}.py')
    config.load_from, config.work_dir = None, str(work_dir)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.dataset.data_root, loader.batch_size = str(images), 40
    config.merge_from_dict({'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1})
    config.default_hooks.logger.interval = config.log_processor.window_size = 1
    for hook in config.custom_hooks:
        if hook.type == 'slope_mm.SlopeMonitorHook':
            hook.update(interval=1, picture=False)
    config.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return tiny.name_run(config)


def folders(root: Path, **more: Any) -> Any:
    init_default_scope('mmdet')
    settings = dict(type='slope_mm.ImageFolders', data_root=str(root), pipeline=[])
    return DATASETS.build({**settings, 'data_prefix': {'img_path': 'train'}, **more})


def model_of(config: Config) -> Any:
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(config.model)


# --- data ----------------------------------------------------------------------------------------


def test_a_folder_is_a_class(images: Path) -> None:
    found = folders(images)
    assert found.metainfo['classes'] == tuple('0123456789')
    labels = [found.get_data_info(i)['gt_label'] for i in range(len(found))]
    paths = [Path(found.get_data_info(i)['img_path']) for i in range(len(found))]
    assert len(found) == 80 and labels == [int(path.parent.name) for path in paths]


def test_metainfo_fixes_the_order_of_the_classes(images: Path) -> None:
    found = folders(images, metainfo={'classes': tuple('9876543210')})
    first = found.get_data_info(0)
    assert Path(first['img_path']).parent.name == '0' and first['gt_label'] == 9


def test_folders_that_hold_no_classes_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='there is no folder'):
        folders(tmp_path)
    (tmp_path / 'train' / 'empty').mkdir(parents=True)
    with pytest.raises(DataError, match='no folder with images'):
        folders(tmp_path)
    with pytest.raises(DataError, match="the class '1', which is not among"):
        folders(images, metainfo={'classes': ('0', '2')})


def test_an_image_arrives_as_it_lies_in_the_file(images: Path) -> None:
    import cv2

    config = Config.fromfile(CONFIGS / f'{SLOPE}.py')
    pipeline = config.train_dataloader.dataset.pipeline
    packed = folders(images, pipeline=pipeline)[9]
    path = images / 'train' / '1' / '1.png'
    assert packed['data_samples'] == 1
    assert np.array_equal(packed['inputs'].numpy().transpose(1, 2, 0), cv2.imread(str(path)))


# --- model ---------------------------------------------------------------------------------------


def test_loss_and_predictions_follow_from_the_logits(images: Path, tmp_path: Path) -> None:
    model = model_of(small_config(images, tmp_path)).eval()
    x, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 3, 9, 1, 1, 5])
    with torch.no_grad():
        logits = model(x)
        loss = model(x, labels, mode='loss')['loss']
        predictions = model(x, labels.tolist(), mode='predict')
    assert logits.shape == (6, 10)
    expected = -logits.double().log_softmax(1)[range(6), labels].mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert [p['label'] for p in predictions] == labels.tolist()
    scores = torch.stack([p['scores'] for p in predictions])
    assert torch.allclose(scores, F.softmax(logits, 1))


def test_a_classifier_says_what_it_lacks(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path)
    model = model_of(config).eval()
    with pytest.raises(ConfigError, match="mode='train'"):
        model(torch.zeros(1, 3, 32, 32), mode='train')
    with pytest.raises(ConfigError, match='needs labels'):
        model(torch.zeros(1, 3, 32, 32), mode='loss')
    config.model.num_classes = 0
    with pytest.raises(ConfigError, match='num_classes=0'):
        model_of(config)


def test_the_prediction_layer_keeps_eight_bits(images: Path, tmp_path: Path) -> None:
    layers = slope_mm.compressed_layers(model_of(small_config(images, tmp_path)))
    assert (layers['fc_cls'].slope_spec.bits, layers['fc_cls'].slope_spec.pattern) == (8, None)
    assert layers['backbone.conv1'].slope_spec.bits == 8
    inner = [layer.slope_spec for name, layer in layers.items() if '.layer' in name]
    assert {(spec.pattern.name, spec.bits) for spec in inner} == {('2:4', 2)}


def test_a_package_that_is_not_there_is_named(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path, default_scope='mmnowhere')
    with pytest.raises(ConfigError, match="'mmnowhere'.*cannot be imported.*install it"):
        build_model(config)


# --- accuracy ------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_wrong() -> None:
    metric = METRICS.build(dict(type='slope_mm.TopKAccuracy', topk=(1, 3)))
    nan = float('nan')
    for scores in ([nan] * 6, [1.0, nan, nan, nan, 0.0, 0.0], [nan, 1.0, 1.0, 1.0, 1.0, 1.0]):
        metric.process({}, [{'scores': torch.tensor(scores), 'label': 0}])
    assert metric.evaluate(3) == {'accuracy/top1': 0.0, 'accuracy/top3': 0.0}


def test_accuracy_counts_labels_among_the_best_scores() -> None:
    noise = np.random.default_rng(1)
    # Few values, so that there are ties: the lower index goes first.
    scores, labels = noise.integers(0, 4, (50, 6)), noise.integers(0, 6, 50)
    metric = METRICS.build(dict(type='slope_mm.TopKAccuracy', topk=(1, 3)))
    for start in (0, 20):
        part = slice(start, 20 if start == 0 else 50)
        samples = [
            {'scores': torch.from_numpy(s).float(), 'label': int(one)}
            for s, one in zip(scores[part], labels[part], strict=True)
        ]
        metric.process({}, samples)
    found = metric.evaluate(50)
    for k in (1, 3):
        best = np.argsort(-scores, axis=1, kind='stable')[:, :k]
        expected = 100 * np.mean([label in row for label, row in zip(labels, best, strict=True)])
        assert found[f'accuracy/top{k}'] == pytest.approx(expected)
    with pytest.raises(ConfigError, match='topk='):
        METRICS.build(dict(type='slope_mm.TopKAccuracy', topk=(0,)))


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    return tiny.train(small_config(images, tmp_path_factory.mktemp('classifier')))


def test_a_classifier_trains_with_slope(run: tiny.Run) -> None:
    rows = tiny.read_losses(run.config.work_dir)
    assert [row['step'] for row in rows] == [1, 2]
    assert all(0.5 < row['slope_cosine_mean'] < 1 for row in rows)
    (evaluation,) = [
        row for row in tiny.read_scalars(run.config.work_dir) if 'accuracy/top1' in row
    ]
    assert 0 <= evaluation['accuracy/top1'] <= 100


def test_file_and_checkpoint_reach_the_same_accuracy(run: tiny.Run, tmp_path: Path) -> None:
    packed = tmp_path / 'model.slope'
    slope_mm.save_packed(run.model, packed)
    found = []
    for number, weights in enumerate((run.checkpoint, packed)):
        work_dir = tmp_path / str(number)
        assert tiny.call_tool('test', run.file, weights, '--work-dir', work_dir) == 0
        (metrics,) = work_dir.glob('*/*.json')
        found.append(metrics.read_text().split('"accuracy/top1": ')[1].split(',')[0])
    assert found[0] == found[1]
