"""Unfolded windows against torch's own unfolding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from slope_mm.export.nodes import NodeWriter
from slope_mm.export.runtime import open_session
from slope_mm.export.windows import Window, unfold

CASES = [
    Window((3, 3), (1, 1), (1, 1)),
    Window((3, 3), (2, 2), (1, 1)),
    Window((3, 2), (1, 3), (2, 1)),
    Window((1, 1), (2, 2), (1, 1)),
    Window((7, 1), (2, 1), (1, 1)),
    Window((2, 3), (2, 1), (3, 2)),
]
SIZES = [(1, 9, 8), (3, 14, 17)]


def expected(x: np.ndarray, window: Window) -> np.ndarray:
    """``[n, h, w, c]`` to ``[n, h', w', i * j * c]``."""
    n, height, width, channels = x.shape
    maps = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    found = torch.nn.functional.unfold(
        maps, window.kernel, dilation=window.dilations, stride=window.strides
    )
    rows, columns = (
        (size - window.reach(axis) - 1) // window.strides[axis] + 1
        for axis, size in enumerate((height, width))
    )
    split = found.reshape(n, channels, -1, rows, columns)
    return split.permute(0, 3, 4, 2, 1).reshape(n, rows, columns, -1).numpy().astype(x.dtype)


def unfolded(x: np.ndarray, window: Window, strips: int, fixed: bool) -> list[np.ndarray]:
    writer, channels = NodeWriter(), x.shape[3]
    size = (x.shape[1], x.shape[2]) if fixed else None
    names = unfold(writer, 'x', channels, window, strips, size)
    graph = helper.make_graph(
        writer.nodes,
        'windows',
        [helper.make_tensor_value_info('x', TensorProto.UINT8, ['n', 'h', 'w', channels])],
        [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names],
        list(writer.constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)])
    model.ir_version = 8
    return list(open_session(model.SerializeToString(), 1).run(None, {'x': x}))


@pytest.mark.parametrize('window', CASES, ids=str)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_windows_are_those_of_torch(window: Window, size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (*size, 5)).astype(np.uint8)
    wanted = expected(x, window)
    for fixed in (False, True):
        (found,) = unfolded(x, window, 1, fixed)
        np.testing.assert_array_equal(found, wanted)
    # More strips than rows: some are empty.
    for strips in (2, 3, 11):
        found = unfolded(x, window, strips, False)
        assert len(found) == strips
        np.testing.assert_array_equal(np.concatenate(found, 1), wanted)


def test_a_map_of_single_pixels_is_left_as_it_is() -> None:
    writer = NodeWriter()
    assert unfold(writer, 'x', 5, Window((1, 1), (1, 1), (1, 1))) == ['x']
    assert writer.nodes == []
