"""What is not compressed, in the layouts and under the names that models give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_mm

RECIPE = dict(weight=dict(sparsity='2:4', bits=4), rules=[dict(match='keep', compress=False)])


class Net(nn.Module):
    """A convolution that stays as it is, one that is compressed, and tensors beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.conv = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.slope_gain = nn.Parameter(torch.rand(1) + 1)
        self.register_buffer('places', torch.rand(4))
        self.register_buffer('square', self.places.view(2, 2))
        self.register_buffer('wide', torch.rand(4, 1).expand(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.places.sum() + self.square[1, 1] + self.wide.mean()
        return self.slope_gain * self.conv(self.keep(x)) + parts


def plain(model: nn.Module) -> nn.Module:
    return model


def permuted(model: Any) -> nn.Module:
    model.keep.weight = nn.Parameter(torch.randn(3, 3, 8, 8).permute(3, 2, 0, 1))
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize('laid_out', [plain, permuted, channels_last])
@pytest.mark.parametrize('wrap', [plain, nn.DataParallel, torch.compile])
def test_a_packed_model_computes_the_same(laid_out: Any, wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = slope_mm.convert(laid_out(Net()), RECIPE).eval()
    slope_mm.save_packed(wrap(model), tmp_path / 'model.slope')
    fresh = Net()
    # torch writes into no expanded tensor.
    fresh.wide = fresh.wide.clone()
    loaded = slope_mm.load_packed(tmp_path / 'model.slope', fresh).eval()
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(loaded.slope_gain, model.slope_gain)
    torch.testing.assert_close(loaded(x), model(x))


def test_names_may_be_as_long_as_the_file_system_takes_them(tmp_path: Path) -> None:
    """In bytes, of which a character may have several."""
    path = tmp_path / ('\u7db2' * 80 + '.slope')
    path.touch()
    size = slope_mm.save_packed(slope_mm.convert(Net(), RECIPE), path)
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [(path.name, size)]
