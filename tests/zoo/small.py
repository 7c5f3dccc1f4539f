"""Stock configs shrunk to seconds: narrow ResNets, fewer queries, short stacks."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from slope_mm.zoo.configs import stock_zoo_config

# Of base_channels 64, and of the 256 channels of necks and heads.
NARROW = 16
HEAD = 64
HEAD_KEYS = (
    'in_channels',
    'out_channels',
    'feat_channels',
    'conv_out_channels',
    'point_feat_channels',
)


def small_config(name: str) -> Config:
    """A stock config with a backbone of a quarter of its width, where that is a ResNet."""
    return shrunk(stock_zoo_config(name))


def shrunk(config: Config) -> Config:
    """Narrows a prepared config's backbone, its own first stage excepted, and what it feeds."""
    model = config.model
    section = model if 'backbone' in model else model.get('detector', model)
    backbone = section.get('backbone', {})
    if backbone.get('type') == 'ResNet':
        backbone['base_channels'] = NARROW
        wide = [256, 512, 1024, 2048]
        for part in section.values():
            _narrow(part, wide)
    elif backbone.get('type') == 'SwinTransformer':
        backbone.update(embed_dims=48, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4])
        backbone.update(window_size=4, init_cfg=None)
        wide = [48, 96, 192, 384]
        for key in ('neck', 'panoptic_head'):
            if key in section:
                section[key]['in_channels'] = wide[-len(section[key]['in_channels']) :]
    _limit(model, 'num_queries', 100)
    _limit(model, 'fc_out_channels', 64)
    _limit(model, 'num_groups', 8)
    _shorten(model)
    if not {'encoder', 'panoptic_head'} & model.keys():
        # Transformers' widths depend on each other in too many ways.
        for key in HEAD_KEYS:
            _replace(model, key, 256, HEAD)
    return config


def _narrow(value: Any, wide: list[int]) -> None:
    """Divides lists of the backbone's channels, and single numbers that can be nothing else."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == 'in_channels' and isinstance(inner, (list, tuple)):
                known = [c in wide for c in inner]
                value[key] = [c // 4 if k else c for c, k in zip(inner, known, strict=True)]
            elif key == 'in_channels' and inner in wide[1:]:
                value[key] = inner // 4
            else:
                _narrow(inner, wide)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _narrow(inner, wide)


def _shorten(value: Any) -> None:
    """Leaves two layers of each transformer."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ('encoder', 'decoder', 'transformer_decoder') and 'num_layers' in inner:
                inner['num_layers'] = 2
            _shorten(inner)


def _replace(value: Any, key: str, old: int, new: int) -> None:
    if isinstance(value, dict):
        if value.get(key) == old:
            value[key] = new
        for inner in value.values():
            _replace(inner, key, old, new)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _replace(inner, key, old, new)


def _limit(value: Any, key: str, most: int) -> None:
    if isinstance(value, dict):
        if isinstance(value.get(key), int):
            value[key] = min(value[key], most)
        for inner in value.values():
            _limit(inner, key, most)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _limit(inner, key, most)
