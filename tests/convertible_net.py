"""A net of every kind of layer, its input, and its short training."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn

import slope_mm

W4 = dict(weight=dict(sparsity='2:4', bits=4))
W4A4 = dict(**W4, activation=dict(bits=4))


class Net(nn.Module):
    """Every kind, grouped and indivisible layers, norms, and what no kind exists for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.conv = nn.Conv2d(8, 12, 3, padding=1, padding_mode='reflect', bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = wrappers.Conv2d(12, 12, 3, groups=3)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.narrow = nn.Conv2d(6, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2)
        self.fc = wrappers.Linear(16, 16)
        self.fc_cls = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu())).relu()
        x = self.narrow(self.up(self.grouped(x))).mean((2, 3))
        x = self.attention(x, x, x)[0]
        return self.fc_cls(self.fc(x).relu())


def key_of(name: str) -> str:
    """The state-dict key of a layer's weight."""
    return 'attention.in_proj_weight' if name == 'attention.in_proj' else f'{name}.weight'


def image() -> Tensor:
    return torch.randn(2, 3, 17, 17)


def trained(recipe: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """A compressed net with calibrated inputs, moved steps and moved BN statistics."""
    model = slope_mm.convert(Net() if model is None else model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(image()).square().sum().backward()
        optimizer.step()
    return model.eval()


class Tied(nn.Module):
    """Two layers of one weight with biases of their own, and a table of words that is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.second.weight, self.out.weight = self.first.weight, self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.table(words)).relu()))
