"""A weight that fused kernels compress again for the backward pass: same gradients, fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import slope_mm
from slope_mm.layers import CompressedLayer
from slope_mm.ops.fused import fused

RECIPE = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))


class Net(nn.Module):
    """Every kind of layer whose weight may be let go, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.conv(x).relu()).relu())
        return self.linear(self.up(x).relu().mean((2, 3)))


def converted(net: nn.Module) -> list[CompressedLayer]:
    slope_mm.convert(net, dict(RECIPE, rules=[]))
    return list(slope_mm.compressed_layers(net).values())


@pytest.fixture(autouse=True)
def with_kernels() -> Iterator[None]:
    with fused():
        yield


def step(net: nn.Module, layers: list[CompressedLayer], x: Tensor, let_go: bool) -> list[Tensor]:
    """The loss with its regularizer, and all gradients, of one training step."""
    net.zero_grad()
    for layer in layers:
        layer.begin_sharing(let_go=let_go)
    y = net(x)
    loss = y.square().sum() + slope_mm.regularization(net)
    for layer in layers:
        layer.end_sharing()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_gradients_are_those_of_a_held_weight() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 8, 6, 6)
    layers = converted(net)
    step(net, layers, x, let_go=False)  # calibrates
    held = step(net, layers, x, let_go=False)
    found = step(net, layers, x, let_go=True)
    assert len(held) == len(found) > 16
    for expected, other in zip(held, found, strict=True):
        # What is used twice has two graph nodes, whose gradients are added up in another order.
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)


def bytes_held(net: nn.Module, layers: list[CompressedLayer], x: Tensor, let_go: bool) -> int:
    """Bytes that a forward leaves allocated until the backward pass, the scope being over."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for layer in layers:
            layer.begin_sharing(let_go=let_go)
        y = net(x)
        loss = slope_mm.regularization(net)
        for layer in layers:
            layer.end_sharing()
    del y, loss
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(e.nbytes() for e in events if e.name() == '[memory]')


@tiny.needs_kernels
def test_no_weight_waits_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten()]
    net = nn.Sequential(*blocks, nn.Linear(64 * 16, 64))
    layers, x = converted(net), torch.randn(1, 64, 4, 4)
    step(net, layers, x, let_go=False)
    weights = sum(layer.weight.nbytes for layer in layers)
    held, let_go = (bytes_held(net, layers, x, which) for which in (False, True))
    assert held > weights
    # The compressed weight, and two bytes a weight for the mask.
    assert held - let_go > 1.45 * weights
