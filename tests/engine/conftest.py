"""Fixtures of the tests that read checkpoints, and models that optim wrappers train."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from checkpoint_runs import make_runner
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from pickle_gadgets import MODULE, code
from torch import nn
from wrapper_cases import calibrated_toy

from slope_mm.engine import checkpoint


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        monkeypatch.delenv(variable, raising=False)
    checkpoint.install()


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two iterations of training; iter_4.pth beside it after four."""
    work_dir = tmp_path_factory.mktemp('trained')
    make_runner(work_dir, 4).train()
    return work_dir / 'iter_2.pth'


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    marker = tmp_path / 'marker'
    (tmp_path / f'{MODULE}.py').write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    statistics = dict(HistoryBuffer._statistics_methods)
    yield marker
    HistoryBuffer._statistics_methods.clear()
    HistoryBuffer._statistics_methods.update(statistics)


@pytest.fixture(scope='module')
def detector_config(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    return tiny_config(tmp_path_factory.mktemp('unused'))


@pytest.fixture(scope='module')
def batch(detector_config: Config) -> Any:
    return tiny.first_batch(detector_config)


@pytest.fixture
def detector(detector_config: Config, slope_run: tiny.Run) -> nn.Module:
    """The Mask R-CNN of the finished run, calibrated."""
    model = tiny.build(detector_config)
    model.load_state_dict(slope_run.model.state_dict())
    return model.train()


@pytest.fixture
def toy() -> Iterator[nn.Module]:
    yield calibrated_toy()
