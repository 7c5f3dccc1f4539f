"""Calibration images: the same every time, and nothing else is touched."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from torch import Tensor, nn

from slope_mm.engine.calibration_images import calibration_batches, run_losses


@pytest.fixture(scope='module')
def config(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp('images'), 'mask_rcnn_r18_shapes_scratch')


def contents(batches: list[Any]) -> list[tuple[int, Tensor]]:
    return [
        (sample.img_id, image)
        for batch in batches
        for sample, image in zip(batch['data_samples'], batch['inputs'], strict=True)
    ]


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def test_batches_are_always_the_same_images_with_the_same_flips(config: Config) -> None:
    torch.manual_seed(1)
    before = random_states()
    first = contents(calibration_batches(config, 2))
    assert random_states() == before
    torch.manual_seed(2)
    second = contents(calibration_batches(config, 2))
    assert len({name for name, _ in first}) == 8
    for (one, image), (two, again) in zip(first, second, strict=True):
        assert one == two and torch.equal(image, again)


def test_every_pass_computes_the_same_and_leaves_no_trace(config: Config, tmp_path: Path) -> None:
    model = tiny.build(config).eval()
    batches = calibration_batches(config, 1)
    seen: list[Tensor] = []
    modes: set[bool] = set()
    # After the random sampling of regions.
    handle = model.roi_head.mask_head.conv_logits.register_forward_hook(
        lambda layer, inputs, output: seen.append(output)
    )
    model.backbone.bn1.register_forward_hook(lambda layer, *rest: modes.add(layer.training))
    state, before = tiny.state_of(model), random_states()
    run_losses(model, batches)
    run_losses(model, batches)
    handle.remove()
    assert len(seen) == 2 and torch.equal(*seen)
    assert modes == {False}
    assert tiny.differing(state, tiny.state_of(model)) == []
    assert random_states() == before
    assert not any(isinstance(m, nn.Module) and m.training for m in model.modules())
