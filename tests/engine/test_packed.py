"""Packed files among detectors: rebuilt from the file alone, loaded by mmengine, written by a
hook."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.models.detectors import RetinaNet
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

import slope_mm
from slope_mm import PackedFileError
from slope_mm.engine import launch
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.packed import by_name, stock_config, stock_model
from slope_mm.layers import base
from slope_mm.packing import read_packed, save_packed

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def packed(slope_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed file of a trained W4A4 detector."""
    path = tmp_path_factory.mktemp('packed') / 'model.slope'
    meta = dict(
        config=stock_config(slope_run.config),
        dataset_meta=dict(classes=('circle', 'square'), palette=[(1, 2, 3), (4, 5, 6)]),
    )
    save_packed(slope_run.model, path, meta)
    return path


def predict(model: nn.Module) -> dict[str, torch.Tensor]:
    found = inference_detector(model, IMAGE).pred_instances
    return {key: found[key] for key in ('bboxes', 'scores', 'labels')}


@pytest.fixture(scope='module')
def expected(slope_run: tiny.Run) -> dict[str, torch.Tensor]:
    """What the trained model itself predicts."""
    init_default_scope('mmdet')
    model = copy.deepcopy(slope_run.model).eval()
    # Inference on arrays rewrites the pipeline in place.
    model.cfg = copy.deepcopy(slope_run.config)
    return predict(model)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert len(expected['scores'])
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_detector_is_rebuilt_from_the_file_alone(
    packed: Path, expected: dict[str, torch.Tensor]
) -> None:
    model = slope_mm.load_packed(packed)
    assert not model.training
    assert model.dataset_meta['classes'] == ('circle', 'square')
    assert_same(predict(model), expected)
    assert {str(la.slope_spec) for la in slope_mm.compressed_layers(model).values()} == {
        '2:4 W4 A4',
        'dense W8 A8',
    }


def test_mmdet_takes_it_as_a_checkpoint(
    packed: Path, slope_run: tiny.Run, expected: dict[str, torch.Tensor]
) -> None:
    model = init_detector(str(slope_run.file), str(packed), device='cpu')
    assert_same(predict(model), expected)
    assert model.dataset_meta['classes'] == ('circle', 'square')
    inferencer = DetInferencer(str(slope_run.file), str(packed), device='cpu', show_progress=False)
    found = inferencer(IMAGE)['predictions'][0]
    assert found['scores'] == pytest.approx(expected['scores'].tolist())


@pytest.mark.parametrize('own', [False, True])
def test_a_model_that_knows_its_config_is_saved_with_it(
    own: bool, slope_run: tiny.Run, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As of init_detector: without the pipeline of the config no image could be given to it."""
    model = init_detector(str(slope_run.file), str(slope_run.checkpoint), device='cpu')
    given = dict(config=dict(model=model.slope_config)) if own else None
    slope_mm.save_packed(model, tmp_path / 'model.slope', given)
    loaded = slope_mm.load_packed(tmp_path / 'model.slope')
    assert ('test_dataloader' in loaded.cfg) == (not own)
    assert loaded.dataset_meta['classes'] == model.dataset_meta['classes']
    if not own:
        assert_same(predict(loaded), expected)


def test_a_config_that_no_file_can_carry_is_named_as_the_models(
    slope_run: tiny.Run, tmp_path: Path
) -> None:
    model = copy.deepcopy(slope_run.model)
    model.cfg = copy.deepcopy(slope_run.config)
    model.cfg.visualizer = dict(type='Own', colour=lambda: 0)
    with pytest.raises(PackedFileError, match=r'model\.cfg cannot be carried.*meta=dict'):
        slope_mm.save_packed(model, tmp_path / 'model.slope')
    assert not list(tmp_path.iterdir())
    slope_mm.save_packed(model, tmp_path / 'model.slope', dict(config=None))
    assert read_packed(tmp_path / 'model.slope').header['config'] is None


def test_a_class_of_a_module_without_dots_is_carried_by_name() -> None:
    module = types.ModuleType('own_module')
    sys.modules['own_module'] = module

    @MODELS.register_module()
    class OwnHead(nn.Module):
        pass

    module.OwnHead = OwnHead  # type: ignore[attr-defined]
    try:
        found = by_name(dict(a=dict(type='own_module.OwnHead'), b=dict(type='mmdet.RetinaNet')))
        assert found == dict(a=dict(type='mmengine.OwnHead'), b=dict(type='mmdet.RetinaNet'))
        assert by_name(dict(type='no_module.Head')) == dict(type='no_module.Head')
    finally:
        MODELS.module_dict.pop('OwnHead')
        del sys.modules['own_module']


def test_the_carried_config_is_the_stock_models(packed: Path, slope_run: tiny.Run) -> None:
    config = read_packed(packed).header['config']
    assert config['model']['type'] == 'MaskRCNN'
    assert 'init_cfg' not in json.dumps(config) and 'recipe' not in config['model']
    assert set(config) == {'default_scope', 'test_dataloader', 'visualizer', 'model'}
    # A SlopeModel knows its model section even where nobody gives a config.
    assert slope_run.model.slope_config['type'] == 'MaskRCNN'


def test_without_a_config_the_model_has_to_be_given(
    slope_run: tiny.Run, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / 'model.slope'
    save_packed(slope_run.model, path, dict(config=None))
    with pytest.raises(PackedFileError, match=r'load_packed\(path, model\)'):
        slope_mm.load_packed(path)
    config = copy.deepcopy(slope_run.config)
    stock = MODELS.build(Config(stock_config(config)).model)
    model = slope_mm.load_packed(path, stock.eval())
    model.cfg = config
    assert_same(predict(model), expected)


def test_a_scope_of_the_model_alone_is_carried(tmp_path: Path) -> None:
    """``mmdet::`` bases say so in the model section, below another default scope."""
    file = tmp_path / 'config.py'
    file.write_text(
        "_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']\n"
        "default_scope = 'mmengine'\n"
        "model = dict(type='slope_mm.SlopeModel', arch='RetinaNet',\n"
        '    recipe=dict(weight=dict(bits=4)),\n'
        '    backbone=dict(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1),\n'
        '    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),\n'
        '    bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3))\n'
    )
    config = Config.fromfile(file)
    init_default_scope('mmengine')
    model = MODELS.build(config.model)
    told = stock_config(config)
    save_packed(model, tmp_path / 'model.slope', dict(config=told))
    assert type(slope_mm.load_packed(tmp_path / 'model.slope')) is RetinaNet
    told['model']['_scope_'] = 'elsewhere'
    save_packed(model, tmp_path / 'model.slope', dict(config=told))
    with pytest.raises(PackedFileError, match="the scope 'elsewhere'.*build the model yourself"):
        slope_mm.load_packed(tmp_path / 'model.slope')


@pytest.mark.parametrize('by_model', [False, True])
def test_a_lazy_configs_classes_are_carried_by_name(by_model: bool, tmp_path: Path) -> None:
    """mmengine's lazy configs hold classes, and its registries know their names."""
    config = Config.fromfile(Path(__file__).with_name('lazy_retinanet.py'), lazy_import=True)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    assert type(model) is RetinaNet
    path = tmp_path / 'model.slope'
    # The export hook and tool give the whole config; by itself a model knows its own section.
    save_packed(model, path, {} if by_model else dict(config=stock_config(config)))
    carried = read_packed(path).header['config']['model']
    assert carried['type'] == 'mmdet.RetinaNet'
    assert carried['test_cfg']['nms']['type'] == 'nms'
    loaded = slope_mm.load_packed(path)
    assert type(loaded) is RetinaNet
    image = torch.randn(1, 3, 64, 64)
    # Losses' classes and test settings are those of the config, and so are the numbers.
    data = dict(inputs=[(image[0] * 50 + 100).byte()], data_samples=[sample()])
    found, wanted = (m.eval().test_step(copy.deepcopy(data))[0] for m in (loaded, model))
    assert len(wanted.pred_instances.scores)
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(found.pred_instances[key], wanted.pred_instances[key]), key


def sample() -> DetDataSample:
    """What a test pipeline says of an image of 64 pixels."""
    shape = (64, 64)
    meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1, 1))
    return DetDataSample(metainfo=meta)


@pytest.mark.parametrize('kind', ['os.system', 'mmdet.apis.inference.init_detector', 'a.b', ''])
def test_a_config_can_name_registered_models_alone(
    kind: str, slope_run: tiny.Run, tmp_path: Path
) -> None:
    """mmengine would import and call whatever a dotted type names."""
    config = stock_config(slope_run.config)
    config['model']['roi_head'] = dict(type='StandardRoIHead', bbox_head=[dict(type=kind)])
    save_packed(slope_run.model, tmp_path / 'model.slope', dict(config=config))
    with pytest.raises(PackedFileError, match='no registered class') as error:
        slope_mm.load_packed(tmp_path / 'model.slope')
    assert f"'{kind}'" in str(error.value)


@pytest.mark.parametrize(
    'change',
    [
        lambda config: config['test_dataloader']['dataset'].update(
            pipeline=[dict(type='os.rmdir')]
        ),
        lambda config: config['visualizer'].update(type='a.b'),
        lambda config: config.update(default_scope='elsewhere'),
    ],
    ids=['pipeline', 'visualizer', 'default_scope'],
)
def test_what_stands_beside_the_model_names_registered_classes_too(
    change: Callable[[dict[str, Any]], None], slope_run: tiny.Run, tmp_path: Path
) -> None:
    """A pipeline is built, and run, when the loaded model is given an image."""
    config = stock_config(slope_run.config)
    change(config)
    save_packed(slope_run.model, tmp_path / 'model.slope', dict(config=config))
    with pytest.raises(PackedFileError, match='build the model yourself'):
        slope_mm.load_packed(tmp_path / 'model.slope')


def test_a_preprocessor_beside_the_model_is_carried(
    slope_run: tiny.Run, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    """mmengine's runner puts it into the model section; mmpretrain's configs count on that."""
    config = copy.deepcopy(slope_run.config)
    config.data_preprocessor = config.model.pop('data_preprocessor')
    built = launch.build_model(config)
    assert torch.equal(built.data_preprocessor.mean, slope_run.model.data_preprocessor.mean)
    save_packed(slope_run.model, tmp_path / 'model.slope', dict(config=stock_config(config)))
    assert_same(predict(slope_mm.load_packed(tmp_path / 'model.slope')), expected)


def test_a_loaded_detector_compresses_each_weight_once_an_evaluation(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slope_mm.load_packed(packed)
    predict(model)
    calls: list[int] = []
    compress = base.compress_with_powers
    monkeypatch.setattr(
        base, 'compress_with_powers', lambda *a, **k: calls.append(1) or compress(*a, **k)
    )
    predict(model)
    assert not calls


@pytest.mark.parametrize('options', [dict(dtype='fp16'), dict(coding='ans')])
def test_the_hooks_options_are_looked_at_before_training(options: dict[str, Any]) -> None:
    with pytest.raises(PackedFileError, match='is unknown; choose one of'):
        HOOKS.build(dict(type='slope_mm.SlopeExportHook', **options))


def test_damaged_files_among_checkpoints_are_named(packed: Path, tmp_path: Path) -> None:
    damaged = bytearray(packed.read_bytes())
    damaged[-3] ^= 1
    path = tmp_path / 'damaged.slope'
    path.write_bytes(damaged)
    with pytest.raises(PackedFileError, match=r"tensor '.*' of .*damaged\.slope is damaged"):
        load_checkpoint_file(path)


# --- the hook ------------------------------------------------------------------------------------


def assert_beside(checkpoint: Path, config: Config) -> None:
    """The packed file computes with the checkpoint's weights."""
    model = tiny.build(config).eval()
    model.load_state_dict(load_checkpoint_file(checkpoint)['state_dict'])
    wanted = slope_mm.bake(model).state_dict()
    found = read_packed(checkpoint.with_suffix('.slope'))
    for key, value in wanted.items():
        assert torch.equal(torch.from_numpy(found[key].copy()), value), key


def test_a_file_without_class_names_has_no_meta_that_says_so(tmp_path: Path) -> None:
    model = slope_mm.convert(torch.nn.Linear(8, 8), dict(weight=dict(sparsity='2:4', bits=4)))
    for meta, wanted in (
        (None, {}),
        (dict(dataset_meta=dict(classes=('a',))), {'classes': ('a',)}),
    ):
        save_packed(model, tmp_path / 'a.slope', meta)
        assert load_checkpoint_file(tmp_path / 'a.slope')['meta'].get('dataset_meta', {}) == wanted
        assert ('dataset_meta' in load_checkpoint_file(tmp_path / 'a.slope')['meta']) == bool(
            wanted
        )


def export_config(make: Callable[..., Config], work_dir: Path, **options: Any) -> Config:
    config = make(work_dir, **options)
    config.custom_hooks.append(dict(type='slope_mm.SlopeExportHook'))
    return config


def test_the_hook_follows_the_checkpoints(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = export_config(tiny_config, tmp_path / 'run', epochs=2)
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1, save_best='coco/bbox_mAP')
    run = tiny.train(config)
    files = {path.stem for path in (tmp_path / 'run').glob('*.slope')}
    checkpoints = {path.stem for path in (tmp_path / 'run').glob('*.pth')}
    assert files == checkpoints and 'epoch_2' in files
    assert any(name.startswith('best_coco_bbox_mAP') for name in files)
    for name in files:
        assert_beside(tmp_path / 'run' / f'{name}.pth', run.config)
    header = read_packed(tmp_path / 'run' / 'epoch_2.slope').header
    assert (header['epoch'], header['iteration']) == (2, 4)
    assert 'circle' in json.dumps(header['dataset_meta'])
    size = (tmp_path / 'run' / 'epoch_2.slope').stat().st_size
    assert f'epoch_2.slope has {size:,} bytes' in tiny.read_log(tmp_path / 'run')


def test_the_hook_packs_averaged_weights_where_they_are_saved(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = export_config(tiny_config, tmp_path / 'run', validate=False)
    config.custom_hooks.insert(0, dict(type='EMAHook', momentum=0.5))
    run = tiny.train(config)
    assert_beside(run.checkpoint, run.config)
    latent = slope_mm.bake(run.model.cpu()).state_dict()
    found = read_packed(run.checkpoint.with_suffix('.slope'))
    key = 'backbone.conv1.weight'
    assert not torch.equal(torch.from_numpy(found[key].copy()), latent[key])


def test_the_best_of_each_metric_and_checkpoints_within_a_ramp(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Two metrics have two best checkpoints; who loads one of a ramp gets the target pattern."""
    config = export_config(tiny_config, tmp_path / 'run', epochs=2)
    metrics = ['coco/bbox_mAP', 'coco/segm_mAP']
    config.default_hooks.checkpoint.update(interval=1, save_best=metrics, rule='greater')
    config.custom_hooks.append(dict(type='slope_mm.SlopeScheduleHook', ramp_until=1.0))
    run = tiny.train(config)
    files = {path.stem for path in (tmp_path / 'run').glob('*.slope')}
    checkpoints = {path.stem for path in (tmp_path / 'run').glob('*.pth')}
    assert files == checkpoints and 'epoch_1' in files
    for metric in ('bbox', 'segm'):
        assert any(name.startswith(f'best_coco_{metric}_mAP') for name in files)
    for name in files:
        assert_beside(tmp_path / 'run' / f'{name}.pth', run.config)


def test_a_resumed_run_removes_the_packed_files_of_checkpoints_that_go(tmp_path: Path) -> None:
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=2)
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    config.custom_hooks = [dict(type='slope_mm.SlopeExportHook')]
    tiny.train(config)
    (tmp_path / 'mine.slope').write_text('of nobody')
    config.update(resume=True)
    config.train_cfg.max_iters = 4
    tiny.train(config)
    assert {path.name for path in tmp_path.glob('iter_*')} == {'iter_4.pth', 'iter_4.slope'}
    assert (tmp_path / 'mine.slope').exists()


def test_a_checkpoint_of_always_the_same_name_has_its_newest_file(tmp_path: Path) -> None:
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=3)
    config.default_hooks.checkpoint.update(interval=1, filename_tmpl='latest.ckpt')
    config.custom_hooks = [dict(type='slope_mm.SlopeExportHook')]
    run = tiny.train(config)
    assert (tmp_path / 'latest.ckpt').exists()
    assert read_packed(tmp_path / 'latest.slope').header['iteration'] == 3
    found = read_packed(tmp_path / 'latest.slope')['first.weight'].copy()
    assert torch.equal(torch.from_numpy(found), slope_mm.bake(run.model).first.weight)


def test_a_checkpoints_name_may_have_dots(tmp_path: Path) -> None:
    hooks = [dict(type='slope_mm.SlopeExportHook')]
    config = tiny.toy_config(tmp_path, custom_hooks=hooks)
    config.default_hooks.checkpoint.update(filename_tmpl='toy_v0.{}', interval=1, max_keep_ckpts=-1)
    tiny.train(config)
    kept = sorted(path.name for path in tmp_path.glob('toy_v0.*'))
    assert kept == ['toy_v0.1', 'toy_v0.1.slope', 'toy_v0.2', 'toy_v0.2.slope']


def test_parts_that_are_compressed_by_themselves_become_stock_too() -> None:
    backbone = dict(type='SwinTransformer', arch='tiny', recipe='none of ours')
    compressed = dict(
        type='slope_mm.SlopeModel', recipe=dict(weight=dict(bits=4)), arch='ResNet', depth=18
    )
    section = dict(
        type='MaskRCNN', backbone=backbone, necks=[compressed, dict(type='FPN')], depth=3
    )
    assert stock_model(section) == dict(
        type='MaskRCNN',
        backbone=backbone,
        necks=[dict(type='ResNet', depth=18), dict(type='FPN')],
        depth=3,
    )
