"""The shipped configs: one start and one schedule for all arms, and recipes as their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from slope_mm.engine.launch import build_model
from slope_mm.engine.regularization import Regularizer
from slope_mm.recipe import Recipe

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
    'dense_w4a4': (None, 4, 4, 'none'),
    'naive_w4': ('2:4', 4, None, 'none'),
    'naive_w4a4': ('2:4', 4, 4, 'none'),
    'l2_w4': ('2:4', 4, None, 'l2'),
}
SHARED = ('load_from', 'train_cfg', 'param_scheduler', 'train_dataloader', 'randomness')


def read(task: str, arm: str) -> Config:
    return Config.fromfile(CONFIGS / f'mask_rcnn_{task}_{arm}.py')


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


def test_every_config_file_is_an_arm_a_start_or_a_base() -> None:
    names = {path.stem for path in CONFIGS.glob('*.py')}
    arms = {f'mask_rcnn_{task}_{arm}' for task in TASKS for arm in (*ARMS, 'fp32')}
    starts = {'mask_rcnn_r18_shapes_scratch', 'mask_rcnn_r18_nuclei_scratch'}
    assert names == arms | starts
