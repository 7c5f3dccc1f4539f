"""The conditions of sparse hardware, against loops and torch's own tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.sparse import semi_structured

import slope_mm
from slope_mm.export.hardware import (
    SEMI_STRUCTURED_SHAPES,
    hardware_reports,
    hardware_table,
    holds_2_to_4,
    semi_structured_obstacle,
    tensorrt_obstacle,
)
from slope_mm.export.semi_structured import SemiStructuredForward, use_semi_structured


@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_2_to_4_is_asked_at_every_position(
    out: int, channels: int, size: int, share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(out, channels, size, size)) * (
        random.random((out, channels, size, size)) < share
    )
    expected = channels % 4 == 0
    if expected:
        for k, group, r, s in itertools.product(
            range(out), range(0, channels, 4), range(size), range(size)
        ):
            if np.count_nonzero(weight[k, group : group + 4, r, s]) > 2:
                expected = False
    assert holds_2_to_4(torch.from_numpy(weight)) == expected


def sparse(module: nn.Module) -> nn.Module:
    model = nn.Sequential(module, nn.Conv2d(8, 8, 1))
    return slope_mm.bake(slope_mm.convert(model, dict(weight=dict(sparsity='2:4', bits=4))))[0]


@pytest.mark.parametrize(
    ('module', 'tensorrt', 'torch_'),
    [
        (nn.Conv2d(64, 32, 1), '', ''),
        (nn.Conv2d(64, 32, 3), '', '3x3 convolution'),
        (nn.Linear(128, 64), '', ''),
        (nn.Linear(128, 48), '', '48 x 128 is no multiple of 32 x 64'),
        (nn.Conv2d(64, 64, 1, groups=2), 'grouped (2)', 'grouped (2)'),
        (nn.ConvTranspose2d(64, 64, 2), 'transposed convolution', 'transposed convolution'),
    ],
)
def test_obstacles_are_told(module: nn.Module, tensorrt: str, torch_: str) -> None:
    pruned = sparse(module)
    assert tensorrt_obstacle(pruned, pruned.weight) == tensorrt
    assert semi_structured_obstacle(pruned, pruned.weight) == torch_


def test_dense_and_odd_layers_are_refused() -> None:
    dense, odd = nn.Conv2d(64, 32, 1), nn.Conv2d(3, 32, 1)
    assert tensorrt_obstacle(dense, dense.weight) == 'not 2:4 along the input channels'
    assert semi_structured_obstacle(dense, dense.weight) == 'not 2:4 along the input channels'
    assert tensorrt_obstacle(odd, odd.weight) == '3 input channels are no multiple of 4'


def test_shapes_satisfy_this_torchs_own_conditions() -> None:
    """Ours may ask for more (an older torch does), never for less."""
    if not hasattr(semi_structured, 'SparseSemiStructuredTensorCUTLASS'):
        pytest.skip('needs torch 2.2, which says its conditions by kernel')
    theirs = semi_structured.SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS
    for dtype, (rows, columns) in SEMI_STRUCTURED_SHAPES.items():
        wanted = theirs[dtype]
        assert rows % wanted.sparse_min_rows == 0 and columns % wanted.sparse_min_cols == 0


def test_the_table_counts_weights() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3, bias=False), nn.Conv2d(256, 256, 1, bias=False))
    slope_mm.convert(model, dict(weight=dict(sparsity='2:4', bits=4)))
    text = hardware_table(model)
    assert 'TensorRT gains from: 2 of 2 layers, 100.0%' in text
    assert 'torch can run semi-structured: 1 of 2 layers, 10.0%' in text
    assert [report.is_2_to_4 for report in hardware_reports(model)] == [True, True]


def test_without_a_gpu_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(slope_mm.ExportError, match='need a CUDA GPU'):
        use_semi_structured(nn.Sequential(sparse(nn.Linear(64, 64))))


@pytest.mark.parametrize(
    'layer',
    [nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1, stride=2), nn.Conv2d(8, 12, 1, padding=1)],
)
def test_convolutions_become_rows_and_back(layer: nn.Conv2d) -> None:
    """The reshaping around the kernel, with a dense product in the kernel's place."""
    forward = SemiStructuredForward.__new__(SemiStructuredForward)
    forward.module, forward.dtype = layer, torch.float32
    forward.weight, forward.bias = layer.weight.flatten(1), layer.bias
    x = torch.randn(2, 8, 7, 9)
    with torch.no_grad():
        assert torch.allclose(forward(x), layer(x), atol=1e-5)


@pytest.mark.skipif(
    not tiny.HAS_CUDA or torch.cuda.get_device_capability() < (8, 0),
    reason='the kernels need a CUDA GPU of compute capability 8.0 or newer',
)
def test_kernels_compute_what_the_dense_layers_compute() -> None:
    model = nn.Sequential(sparse(nn.Conv2d(64, 64, 1)), nn.ReLU(), sparse(nn.Conv2d(64, 64, 1)))
    model = model.cuda().eval()
    x = torch.randn(2, 64, 16, 16, device='cuda')
    with torch.no_grad():
        expected = model(x)
        assert use_semi_structured(model) == ['0', '2']
        assert torch.allclose(model(x), expected, atol=2e-2, rtol=2e-2)
