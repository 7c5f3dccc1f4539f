"""Packed files and detectors: the config that a file carries, and detectors built from it."""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections.abc import Mapping
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import MODELS, Registry, init_default_scope
from torch import nn

from slope_mm.errors import PackedFileError
from slope_mm.packing.loader import load_packed as load_packed_into
from slope_mm.packing.loader import packed_state_dict
from slope_mm.packing.plainconfig import from_plain, to_plain
from slope_mm.packing.reader import PackedFile
from slope_mm.packing.writer import SMALLEST, unwrapped
from slope_mm.packing.writer import save_packed as save_model

# What inference needs of a config, besides the model.
CONFIG_KEYS = ('default_scope', 'test_dataloader', 'visualizer')
# Packages whose registered classes a file's config may name. Beyond a registry's names, mmengine
# would import and call whatever a dotted type names.
SCOPES = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmcls', 'mmseg', 'mmpose', 'mmrotate')


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stock model's config, as a packed file carries it.

    Args:
        config: A whole config, with a SlopeModel or a stock model.

    Returns:
        Its model section with the stock type and without recipe and initialisers, and what
        inference needs beside.
    """
    plain = config.to_dict() if isinstance(config, Config) else dict(config)
    kept = {key: by_name(plain[key]) for key in CONFIG_KEYS if plain.get(key) is not None}
    return {**kept, 'model': stock_model(model_section(plain))}


def model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's model section with the ``data_preprocessor`` that stands beside it.

    mmengine's runner puts it there (mmpretrain's configs count on that); nobody else does.
    """
    section = copy.deepcopy(dict(config['model']))
    if config.get('data_preprocessor') is not None:
        section.setdefault('data_preprocessor', copy.deepcopy(config['data_preprocessor']))
    return section


def stock_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model section with the stock type, without recipe and initialisers, all types by name.

    So are parts of it that are compressed by themselves (a SlopeModel as a backbone).
    """
    return by_name(_without_init(_uncompressed(model, is_whole=True)))


def _uncompressed(value: Any, is_whole: bool = False) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_uncompressed(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    parts = {key: _uncompressed(item) for key, item in value.items()}
    kind = parts.get('type', '')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    # Swin and others have an arch of their own.
    if is_whole or name.rpartition('.')[2] == 'SlopeModel':
        parts.pop('recipe', None)
        if 'arch' in parts:
            parts['type'] = parts.pop('arch')
    return parts


def _without_init(value: Any) -> Any:
    # The weights are in the file; initialisers would fetch others from elsewhere.
    if isinstance(value, Mapping):
        return {k: _without_init(v) for k, v in value.items() if k != 'init_cfg'}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_init(item) for item in value)
    return value


def by_name(value: Any, key: str = '') -> Any:
    """A config whose types are registered names where they were classes, as lazy configs have them.

    Their dictionaries give dotted paths in place of the classes. What is not registered stays.
    """
    if isinstance(value, Mapping):
        return {k: by_name(item, k) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(by_name(item) for item in value)
    if key != 'type':
        return value
    found = value
    if isinstance(value, str):
        # One dot may be a scope's.
        path = value.count('.') > (value.split('.')[0] in SCOPES)
        found = _object_at(value) if path else None
        if found is None:
            return value
    name = registered_name(found)
    if name is None and not isinstance(found, type):
        # mmcv looks up its NMS functions by their own names, which no registry has.
        name = getattr(found, '__name__', None)
    return name or value


def _object_at(path: str) -> Any:
    module, _, name = path.rpartition('.')
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever a package raises while it is imported, and names that are none
        return None


def registered_name(kind: Any) -> str | None:
    """``'mmdet.RetinaNet'`` of a class or function that some registry of the field knows."""
    roots = [x for x in vars(mmengine.registry).values() if isinstance(x, Registry)]
    for registry in (each for root in roots for each in (root, *root.children.values())):
        for name, known in registry.module_dict.items():
            if known is kind:
                return f'{registry.scope}.{name}'
    return None


def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    meta: Mapping[str, Any] | None = None,
    *,
    coding: str = SMALLEST,
    dtype: str | None = None,
) -> int:
    """:func:`slope_mm.packing.save_packed`, with the config of a model that knows its own.

    ``mmdet.apis.init_detector`` leaves it in ``model.cfg``; a detector that is built from the file
    alone needs the pipeline in it. ``meta['config']`` comes first.
    """
    inner = unwrapped(model)
    config = getattr(inner, 'cfg', None)
    told = dict(meta or {})
    if isinstance(config, Config) and config.get('model') and 'config' not in told:
        told['config'] = stock_config(config)
        if getattr(inner, 'slope_config', None) is not None:
            told['config']['model'] = inner.slope_config
        try:
            to_plain(told['config'], 'it')
        except PackedFileError as error:
            raise PackedFileError(
                f'model.cfg cannot be carried by a packed file ({error}); give'
                ' meta=dict(config=dict(model=…)) with one that can, or meta=dict(config=None)'
            ) from None
    return save_model(model, path, told, coding=coding, dtype=dtype)


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Loads a packed file into a model, or into one that is built from the file alone.

    Args:
        path: The file.
        model: As in :func:`slope_mm.packing.load_packed`; None builds the detector that the
            header's config describes.

    Returns:
        The model; a built one in evaluation mode, with ``cfg`` and ``dataset_meta`` as
        ``mmdet.apis.inference_detector`` wants them.

    Raises:
        PackedFileError: If the file is damaged, carries no config to build from, or belongs to
            another model.
    """
    if model is not None:
        return load_packed_into(path, model)
    header = PackedFile.open(path).header
    config = from_plain(header.get('config'))
    if not isinstance(config, dict) or not isinstance(config.get('model'), dict):
        raise PackedFileError(
            f'{os.fspath(path)} carries no config to build its model from; build it, and give it as'
            ' load_packed(path, model)'
        )
    # All of it: the pipeline of its test set is built when an image is given to the model.
    _check_types(config, os.fspath(path))
    init_default_scope(str(config.get('default_scope') or 'mmdet'))
    try:
        # Stock detectors write into the config that they are built from.
        built = MODELS.build(Config(copy.deepcopy(config)).model)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise PackedFileError(
            f"the model that {os.fspath(path)}'s config describes cannot be built ({reason}); build"
            ' it, and give it as load_packed(path, model)'
        ) from error
    load_packed_into(path, built)
    built.cfg = Config(config)
    built.dataset_meta = from_plain(header.get('dataset_meta')) or {}
    return built.eval()


def _check_types(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        kind = value.get('type')
        if isinstance(kind, str) and not re.fullmatch(rf'(({"|".join(SCOPES)})\.)?\w+', kind):
            raise PackedFileError(
                f"the config of {name} asks for '{kind[:100]}', which is no registered class of"
                f' {", ".join(SCOPES)}; build the model yourself, and give it as'
                ' load_packed(path, model)'
            )
        for key in ('_scope_', 'default_scope'):
            scope = value.get(key, SCOPES[0])
            if scope not in SCOPES:
                raise PackedFileError(
                    f"the config of {name} asks for the scope '{str(scope)[:100]}', which is none"
                    f' of {", ".join(SCOPES)}; build the model yourself, and give it as'
                    ' load_packed(path, model)'
                )
        for item in value.values():
            _check_types(item, name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_types(item, name)


def read_packed_checkpoint(content: bytes, name: str) -> dict[str, Any]:
    """A packed file as the checkpoint that mmengine loads.

    Args:
        content: The file's bytes.
        name: What messages call it.

    Returns:
        ``state_dict`` of the compressed model, and ``meta``.

    Raises:
        PackedFileError: If it is damaged.
    """
    try:
        file = PackedFile.parse(content, name)
        state = packed_state_dict(file)
    except PackedFileError as error:
        text = str(error)
        raise PackedFileError(text if name in text else f'{name}: {text}') from None
    dataset_meta = from_plain(file.header.get('dataset_meta'))
    # Without class names mmdet takes COCO's, and says so.
    meta = {'dataset_meta': dataset_meta} if isinstance(dataset_meta, dict) and dataset_meta else {}
    return {'state_dict': state, 'meta': meta}
