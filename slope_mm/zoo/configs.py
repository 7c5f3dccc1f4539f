"""Stock configs made fit for a trial, and the compressed twin's config."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config

from slope_mm.zoo.catalogue import config_path, config_root, read

RECIPE = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))
# Regions that a second stage trains on and looks at; their number changes no weight's part in it.
REGIONS = 32
# SyncBN trains on GPUs alone, AMP too; both twins get what mmengine itself takes without one.
ON_CPU = {'SyncBN': 'BN', 'MMSyncBN': 'BN', 'AmpOptimWrapper': 'OptimWrapper'}


def stock_zoo_config(name: str) -> Config:
    """Reads a stock config and takes out what would fetch weights or need a GPU.

    Args:
        name: Path below mmdet's configs, or ``PACKAGE::`` and a path below another's.
    """
    return prepared(read(config_path(name)))


def prepared(config: Config) -> Config:
    """The same config without downloads, frozen stages and what needs a GPU."""
    config = copy.deepcopy(config)
    config.load_from = None
    model = config.model
    # As mmengine's Runner does.
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', copy.deepcopy(config.data_preprocessor))
    preprocessor = model.get('data_preprocessor') or {}
    if preprocessor.pop('size', None) is not None:
        # mmseg's pads to the size of the data set's crops.
        preprocessor['size_divisor'] = 32
    for section in (model, model.get('detector', {})):
        if section.get('backbone', {}).get('frozen_stages', -1) > 0:
            section['backbone']['frozen_stages'] = -1
        if isinstance(section.get('teacher_config'), str):
            inner = section['teacher_config'].split('configs/', 1)[-1]
            section['teacher_config'] = str(config_root() / inner)
        if 'teacher_ckpt' in section:
            section['teacher_ckpt'] = None
        # Resizes batches at random, to sizes of several hundred pixels.
        if section.get('data_preprocessor', {}).get('batch_augments'):
            section['data_preprocessor']['batch_augments'] = None
    _clean(config.model)
    if config.get('optim_wrapper') is None:
        # A tracker's, whose parts are trained by other configs.
        config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    _clean(config.optim_wrapper)
    config.optim_wrapper.pop('loss_scale', None)
    return config


def _clean(section: Any) -> None:
    if isinstance(section, dict):
        init = section.get('init_cfg')
        if isinstance(init, dict) and 'checkpoint' in init:
            section['init_cfg'] = None
        if isinstance(section.get('pretrained'), str):
            section['pretrained'] = None
        if {'num', 'pos_fraction'} <= section.keys():
            section['num'] = min(section['num'], REGIONS)
        for key in ('rpn', 'rpn_proposal'):
            limits = section.get(key)
            if isinstance(limits, dict) and 'max_per_img' in limits:
                limits['max_per_img'] = min(limits['max_per_img'], 2 * REGIONS)
        kind = section.get('type')
        if kind in ON_CPU:
            section['type'] = ON_CPU[kind]
        for value in section.values():
            _clean(value)
    elif isinstance(section, (list, tuple)):
        for value in section:
            _clean(value)


def slope_config(config: Config) -> Config:
    """The compressed twin's config: 2:4, W4A4, everything else as it is."""
    made = copy.deepcopy(config)
    made.model.arch, made.model.type = made.model.type, 'slope_mm.SlopeModel'
    made.model.recipe = RECIPE
    wrapper = made.optim_wrapper
    if 'constructor' in wrapper:
        wrapper.base_constructor = wrapper.constructor
    wrapper.constructor = 'slope_mm.SlopeOptimWrapperConstructor'
    wrapper.regularizer = dict(type='cosine', weight=1.0)
    return made
