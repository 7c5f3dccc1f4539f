"""A small net whose layers differ in what they can hold, and its images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slope_mm.recipe import Recipe

RECIPE = Recipe.parse(dict(weight=dict(sparsity='2:4', bits=4)))


class Net(nn.Module):
    """A stem, layers for 2:8, for 2:4 at most, for nothing, and a prediction layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.wide = nn.Conv2d(16, 12, 3)
        self.narrow = nn.Conv2d(12, 6, 1)
        self.odd = nn.Conv2d(6, 16, 1)
        self.fc = nn.Linear(16, 16)
        self.fc_cls = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.wide(self.stem(x).relu()).relu())
        return self.fc_cls(self.fc(self.odd(x).relu().mean((2, 3))).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
