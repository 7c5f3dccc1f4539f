"""Whether the files that a config's data come from are there, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slope_mm.errors import DataError


def check_data(loader: Mapping[str, Any] | None, name: str) -> None:
    """Looks whether the annotation files and image folders of a dataloader exist.

    Raises:
        DataError: Names what is missing and where it was looked for.
    """
    for dataset in datasets_of((loader or {}).get('dataset')):
        if is_elsewhere(dataset):
            continue
        root = str(dataset.get('data_root') or '')
        prefix = dataset.get('data_prefix') or {}
        # mmpretrain writes one prefix as a string.
        prefixes = prefix.values() if isinstance(prefix, Mapping) else (prefix,)
        wanted = [dataset.get('ann_file'), *prefixes]
        for part in wanted:
            if not isinstance(part, str) or '://' in root + part:
                continue
            path = Path(root) / part
            if not path.exists():
                advice = (
                    f'make it with: python tools/make_shapes.py {root.rstrip("/")}'
                    if 'shapes' in root
                    else f'put the data there, or set {name}.dataset.data_root'
                )
                raise DataError(f"{name}: there is no '{path}'; {advice}")


def check_annotations(evaluator: Any, name: str) -> None:
    """Looks whether the annotation files that metrics read exist.

    Raises:
        DataError: Names what is missing.
    """
    if isinstance(evaluator, (list, tuple)):
        for part in evaluator:
            check_annotations(part, name)
    if not isinstance(evaluator, Mapping):
        return
    check_annotations(evaluator.get('metrics'), name)
    file = evaluator.get('ann_file')
    if not isinstance(file, str) or '://' in file or is_elsewhere(evaluator):
        return
    if not Path(file).exists():
        raise DataError(
            f"{name}: there is no '{file}'; put the data there, or set {name}.ann_file"
            ' (it is not relative to data_root)'
        )


def is_elsewhere(settings: Mapping[str, Any]) -> bool:
    """Whether a storage backend of mmengine's, and not the file system, has the data."""
    given = settings.get('backend_args') or settings.get('file_client_args') or {}
    return isinstance(given, Mapping) and given.get('backend', 'local') not in ('local', 'disk')


def datasets_of(config: Any) -> Iterator[Mapping[str, Any]]:
    """The innermost data sets of a config, through wrappers and concatenations."""
    if isinstance(config, Mapping):
        nested = [config[key] for key in ('dataset', 'datasets') if key in config]
        if not nested:
            yield config
        for part in nested:
            yield from datasets_of(part)
    elif isinstance(config, (list, tuple)):
        for part in config:
            yield from datasets_of(part)
