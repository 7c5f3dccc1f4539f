"""Models of mmpretrain and mmseg through SlopeModel; skipped where their packages are absent."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from slope_mm.zoo.catalogue import RELATIVES, config_path, relatives
from slope_mm.zoo.configs import stock_zoo_config
from slope_mm.zoo.page import GOAL, accounted, complaints
from slope_mm.zoo.trial import try_config

CLASSIFIERS = ('resnet18_8xb32_in1k', 'deit-small_4xb256_in1k')
SEGMENTORS = (
    'fcn_r50-d8_4xb2-40k_cityscapes-512x1024',
    'segformer_mit-b0_8xb1-160k_cityscapes-1024x1024',
)


def check(name: str) -> dict[str, Any]:
    (config,) = [c for c in RELATIVES if c.endswith(f'/{name}.py')]
    found: dict[str, Any] = {}
    try_config(stock_zoo_config(config), lambda **values: found.update(values))
    assert complaints(found) == []
    assert found['packed'] == 'equal'
    assert accounted(found) >= GOAL, found['dense_left']
    assert found['steps'] > 0
    return found


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_of_mmpretrain_is_compressed(mmpretrain: ModuleType, name: str) -> None:
    check(name)


@pytest.mark.parametrize('name', SEGMENTORS)
def test_a_segmentor_of_mmseg_is_compressed(mmseg: ModuleType, name: str) -> None:
    found = check(name)
    left = {reason for reason, _, _ in found['not_sparse']}
    assert 'prediction layer' in left


def test_the_relatives_of_installed_packages_are_listed() -> None:
    installed = [name for name in RELATIVES if importlib.util.find_spec(name.split('::')[0])]
    entries = relatives()
    assert [entry.config for entry in entries] == installed
    for entry in entries:
        assert config_path(entry.config).is_file()
        assert entry.detector and entry.backbone and not entry.problem
