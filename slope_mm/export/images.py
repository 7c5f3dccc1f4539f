"""Real inputs for the gate and the benchmark: images of the test set, or of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from slope_mm.engine.data_files import check_data
from slope_mm.errors import DataError


def image_batches(config: Config, count: int, images: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Batches of one image each, through the config's test pipeline.

    Args:
        config: A config with a ``test_dataloader``.
        count: How many images of the test set.
        images: Image files to take instead.

    Raises:
        DataError: If the test set or an image is missing, or cannot be used.
    """
    init_default_scope(config.get('default_scope') or 'mmdet')
    if config.get('test_dataloader') is None:
        raise DataError(
            "the config has no 'test_dataloader', whose pipeline prepares images; inherit from one"
            ' that has'
        )
    if images:
        return [_batch_of(config, image) for image in images]
    try:
        check_data(config.get('test_dataloader'), 'test_dataloader')
    except DataError as error:
        raise DataError(f'{error}; or give images of your own with --images') from None
    loader = copy.deepcopy(config.test_dataloader)
    # What only workers know.
    for key in ('prefetch_factor', 'batch_sampler', 'timeout'):
        loader.pop(key, None)
    loader.update(
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    batches: Iterator[dict[str, Any]] = iter(Runner.build_dataloader(loader))
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def _batch_of(config: Config, image: str) -> dict[str, Any]:
    if not Path(image).is_file():
        raise DataError(f"there is no image '{image}'; give paths of image files")
    steps = [step for step in _test_pipeline(config) if 'LoadAnnotations' not in str(step['type'])]
    try:
        batch: dict[str, Any] = pseudo_collate([Compose(steps)(dict(img_path=image, img_id=0))])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"'{image}' cannot be prepared by the config's test pipeline ({reason[:200]}); give"
            ' paths of image files'
        ) from error
    return batch


def _test_pipeline(config: Config) -> list[dict[str, Any]]:
    """The steps of the innermost test data set."""
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return list(dataset.pipeline)
