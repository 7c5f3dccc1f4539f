"""The shipped configs: one start and one schedule for all arms, and recipes as their names say."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from zoo.small import shrunk

from slope_mm.convert import compressed_layers
from slope_mm.engine.calibration import uncalibrated_layers
from slope_mm.engine.launch import build_model
from slope_mm.engine.regularization import Regularizer
from slope_mm.recipe import Recipe
from slope_mm.zoo.catalogue import config_root
from slope_mm.zoo.catalogue import read as read_stock
from slope_mm.zoo.configs import prepared
from slope_mm.zoo.trial import build, predict, train_step

CONFIGS = Path(__file__).parents[1] / 'configs'
TASKS = ('r50', 'r18_shapes', 'r18_nuclei')
# name: pattern, weight bits, activation bits, regularizer
ARMS: dict[str, tuple[str | None, int, int | None, str]] = {
    'slope_w4': ('2:4', 4, None, 'cosine'),
    'slope_w4a4': ('2:4', 4, 4, 'cosine'),
    'slope_w2': ('2:4', 2, None, 'cosine'),
    'slope_2x8_w4': ('2:8', 4, None, 'cosine'),
    'slope_2x16_w4': ('2:16', 4, None, 'cosine'),
    'dense_w4': (None, 4, None, 'none'),
    'dense_w3': (None, 3, None, 'none'),
    'dense_w4a4': (None, 4, 4, 'none'),
    'naive_w4': ('2:4', 4, None, 'none'),
    'naive_w4a4': ('2:4', 4, 4, 'none'),
    'l2_w4': ('2:4', 4, None, 'l2'),
}
# name: class, mmdet's config, what its published checkpoint is called
DETECTORS: dict[str, tuple[str, str, str]] = {
    'faster_rcnn_r50': (
        'FasterRCNN',
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'faster_rcnn_r50_fpn_2x_coco',
    ),
    'cascade_mask_rcnn_r50': (
        'CascadeRCNN',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'cascade_mask_rcnn_r50_fpn_20e_coco',
    ),
    'retinanet_r50': (
        'RetinaNet',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'retinanet_r50_fpn_2x_coco',
    ),
    'atss_r50': ('ATSS', 'atss/atss_r50_fpn_1x_coco.py', 'atss_r50_fpn_1x_coco'),
    'fcos_r50': (
        'FCOS',
        'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py',
        'fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco',
    ),
    'rtmdet_ins_s': (
        'RTMDet',
        'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
        'rtmdet-ins_s_8xb32-300e_coco',
    ),
    'mask2former_r50': (
        'Mask2Former',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        'mask2former_r50_8xb2-lsj-50e_coco',
    ),
    'mask2former_swin_t': (
        'Mask2Former',
        'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
        'mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco',
    ),
    'dino_r50': ('DINO', 'dino/dino-4scale_r50_8xb2-12e_coco.py', 'dino-4scale_r50_8xb2-12e_coco'),
    'dino_swin_l': (
        'DINO',
        'dino/dino-5scale_swin-l_8xb2-12e_coco.py',
        'dino-5scale_swin-l_8xb2-12e_coco',
    ),
}
DETECTOR_ARMS = ('slope_w4', 'slope_w4a4')
SHARED = ('load_from', 'train_cfg', 'param_scheduler', 'train_dataloader', 'randomness')


def read(task: str, arm: str) -> Config:
    return Config.fromfile(CONFIGS / f'mask_rcnn_{task}_{arm}.py')


@functools.cache
def _detector(name: str, arm: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}_{arm}.py')


def detector(name: str, arm: str) -> Config:
    return copy.deepcopy(_detector(name, arm))


def plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, 'to_dict') else value


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('arm', ARMS)
def test_an_arm_does_what_its_name_says(task: str, arm: str) -> None:
    config = read(task, arm)
    recipe = Recipe.parse(config.model.recipe)
    pattern = None if recipe.weight.sparsity is None else recipe.weight.sparsity.name
    regularizer = Regularizer.parse(config.optim_wrapper.regularizer)
    found = (pattern, recipe.weight.bits, recipe.activation_bits, regularizer.type)
    assert found == ARMS[arm]
    assert regularizer.type == 'none' or regularizer.weight > 0
    assert config.model.arch == 'MaskRCNN'


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('arm', ARMS)
def test_all_arms_of_a_task_share_start_and_schedule(task: str, arm: str) -> None:
    config, fp32 = read(task, arm), read(task, 'fp32')
    for key in SHARED:
        assert plain(config[key]) == plain(fp32[key]), key
    assert plain(config.optim_wrapper.optimizer) == plain(fp32.optim_wrapper.optimizer)
    # Beside type, arch and recipe the model is the stock one.
    model, stock = plain(config.model), plain(fp32.model)
    assert model.pop('type') == 'slope_mm.SlopeModel'
    model.pop('recipe')
    assert model.pop('arch') == stock.pop('type')
    assert model == stock


def test_the_flagship_starts_from_the_published_checkpoint_of_its_architecture() -> None:
    config = read('r50', 'slope_w4a4')
    assert 'mask_rcnn_r50_fpn_mstrain-poly_3x_coco' in config.load_from
    assert config.model.backbone.depth == 50
    assert config.model.backbone.frozen_stages == -1
    assert config.model.roi_head.mask_head.num_classes == 80


@pytest.mark.parametrize('task', TASKS)
def test_the_flagship_recipe_compresses_nearly_everything(task: str) -> None:
    from slope_mm import report

    totals = report(build_model(read(task, 'slope_w4a4'))).totals
    assert totals['compressed_share'] == 1
    assert totals['sparse_share'] > 0.98
    assert totals['ratio'] > 10


@pytest.mark.parametrize('arm', DETECTOR_ARMS)
@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_config_says_only_what_slope_adds(name: str, arm: str) -> None:
    arch, _, published = DETECTORS[name]
    config, fp32 = detector(name, arm), detector(name, 'fp32')
    recipe = Recipe.parse(config.model.recipe)
    regularizer = Regularizer.parse(config.optim_wrapper.regularizer)
    assert recipe.weight.sparsity is not None
    pattern = recipe.weight.sparsity.name
    assert (pattern, recipe.weight.bits, recipe.activation_bits, regularizer.type) == ARMS[arm]
    assert published in config.load_from
    for key in SHARED[:4]:
        assert plain(config.get(key)) == plain(fp32.get(key)), key
    model, stock = plain(config.model), plain(fp32.model)
    model.pop('recipe')
    assert (model.pop('type'), model.pop('arch')) == ('slope_mm.SlopeModel', arch)
    assert stock.pop('type') == arch
    assert model == stock
    lines = (CONFIGS / f'{name}_{arm}.py').read_text().splitlines()
    assert len(lines) <= 15


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_config_adds_the_hooks_of_a_slope_run(name: str) -> None:
    shared = Config.fromfile(CONFIGS / '_base_/schedules/slope_hooks.py').slope_hooks
    own = [plain(hook) for hook in detector(name, 'slope_w4a4').custom_hooks]
    assert [h for h in own if h['type'].startswith('slope_mm.')] == [plain(h) for h in shared]
    stock = read_stock(config_root() / DETECTORS[name][1]).get('custom_hooks') or []
    # The second stage's pipeline of RTMDet is the whole fine-tuning's.
    kept = {h.type for h in stock} - {'PipelineSwitchHook'}
    assert kept <= {h['type'] for h in own}


@pytest.mark.parametrize('arm', ['fp32', *DETECTOR_ARMS])
@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_config_keeps_the_stock_optimizer_settings(name: str, arm: str) -> None:
    ours = plain(detector(name, arm).optim_wrapper)
    stock = plain(read_stock(config_root() / DETECTORS[name][1]).optim_wrapper)
    for key in ('type', 'paramwise_cfg', 'clip_grad', 'accumulative_counts'):
        if key == 'clip_grad' and stock.get(key) is None:
            continue
        assert ours.get(key) == stock.get(key), key
    slower = ours['optimizer'].pop('lr') < stock['optimizer'].pop('lr')
    assert slower
    assert ours['optimizer'] == stock['optimizer']


@pytest.mark.parametrize('arm', DETECTOR_ARMS)
@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_config_builds_steps_and_predicts(name: str, arm: str) -> None:
    config = shrunk(prepared(detector(name, arm)))
    model = build(config)
    # DINO chooses its queries among the cells of the pyramid.
    side = 128 if config.model.arch == 'DINO' else 64
    loss, reached = train_step(model, config, side)
    assert math.isfinite(loss)
    steps = {key for key, p in model.named_parameters() if '.slope_' in key and p.requires_grad}
    blank = {f'{key}.slope_act_step' for key in uncalibrated_layers(model)}
    assert steps - blank <= reached
    assert len(predict(model, config, side)) == 1
    layers = compressed_layers(model)
    offsets = [layer for key, layer in layers.items() if key.endswith('sampling_offsets')]
    assert bool(offsets) == (config.model.arch in ('DINO', 'Mask2Former'))
    assert all(layer.slope_spec.bits == 8 for layer in offsets)
    if arm == 'slope_w4a4':
        check_parameter_groups(name, model, config)


def check_parameter_groups(name: str, model: nn.Module, config: Config) -> None:
    """Learning rate and weight decay of each stock parameter, with our constructor and without."""
    stock = shrunk(prepared(detector(name, 'fp32')))
    expected = _settings(build_model(stock), stock)
    found = _settings(model, config)
    steps = {key: found.pop(key) for key in list(found) if '.slope_' in key}
    assert found == expected
    assert steps
    assert {decay for _, decay in steps.values()} == {0.0}


def _settings(model: nn.Module, config: Config) -> dict[str, tuple[float, float]]:
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    of = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def test_every_config_file_is_an_arm_a_start_or_a_base() -> None:
    names = {path.stem for path in CONFIGS.glob('*.py')}
    arms = {f'mask_rcnn_{task}_{arm}' for task in TASKS for arm in (*ARMS, 'fp32')}
    detectors = {f'{name}_{arm}' for name in DETECTORS for arm in (*DETECTOR_ARMS, 'fp32')}
    starts = {f'{name}_scratch' for name in ('mask_rcnn_r18_shapes', 'mask_rcnn_r18_nuclei')}
    # What tools/level_steps.py measures.
    levels = {'retinanet_r18_shapes_scratch', 'retinanet_r18_shapes_slope_w4a4'}
    assert names == arms | detectors | starts | levels
