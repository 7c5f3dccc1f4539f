"""A small shapes set that is made once for a file of tests."""

from __future__ import annotations

import pytest
from small_shapes import SMALL

from slope_mm.datasets.shapes import ShapesPaths, make_shapes


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    return make_shapes(tmp_path_factory.mktemp('shapes') / 'small', **SMALL)
