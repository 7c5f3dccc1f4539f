"""torch.jit.trace, which mmengine's complexity counter (mmdet's get_flops.py) goes by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import Tensor, nn

import slope_mm

pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')

RECIPES: dict[str, dict[str, Any]] = {
    'W4': dict(weight=dict(sparsity='2:4', bits=4)),
    'dense W4': dict(weight=dict(sparsity=None, bits=4)),
    'A4': dict(weight=dict(sparsity=None, bits=None), activation=dict(bits=4)),
    'W4A4': dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4)),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


def network(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == 'attention':
        return Attention(), torch.randn(2, 5, 8)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(2))
    return nn.Sequential(*net, nn.Linear(64, 3)), torch.randn(2, 8, 9, 9)


@pytest.mark.parametrize('gradients', [True, False])
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('kind', ['layers', 'attention'])
def test_a_traced_network_computes_what_it_did(kind: str, recipe: str, gradients: bool) -> None:
    torch.manual_seed(0)
    net, x = network(kind)
    net = slope_mm.convert(net, RECIPES[recipe])
    net(x)
    net.eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(net, x, check_trace=False)
    with torch.no_grad():
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), net(other), rtol=0, atol=1e-6)


def test_mmengine_counts_as_many_operations_as_in_the_stock_network() -> None:
    net, x = network('layers')
    stock = get_model_complexity_info(net, inputs=(x,), show_table=False, show_arch=False)
    net = slope_mm.convert(net, RECIPES['W4A4']).eval()
    ours = get_model_complexity_info(net, inputs=(x,), show_table=False, show_arch=False)
    assert ours['flops'] == stock['flops'] > 0
