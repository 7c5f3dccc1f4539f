"""Fixtures of the tests that read checkpoints: one of a real Runner, and a marker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_runs import make_runner
from mmengine.logging import HistoryBuffer
from pickle_gadgets import MODULE, code

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
