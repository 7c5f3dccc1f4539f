"""What tools/train.py says before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from slope_mm.engine import launch


@pytest.mark.parametrize(
    ('options', 'warned'),
    [
        ({}, True),
        ({'load_from': 'trained.pth'}, False),
        ({'load_from': 'epoch_1.pth', 'resume': True}, False),
        ({'model__init_cfg': dict(type='Pretrained', checkpoint='trained.pth')}, False),
        ({'model': dict(_delete_=True, type='ToyNet')}, False),
    ],
    ids=['no start', 'load_from', 'resumed', 'init_cfg', 'dense'],
)
def test_a_compressed_model_without_a_start_is_warned_about(
    options: dict[str, Any], warned: bool, tmp_path: Path
) -> None:
    runner = launch.build_runner(tiny.toy_config(tmp_path, **options))
    launch.warn_without_start(runner)
    assert ('load_from is empty' in tiny.read_log(tmp_path)) == warned
