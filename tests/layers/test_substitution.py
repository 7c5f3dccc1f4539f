"""Weights that stand in for parameters while a stock forward runs: one thread at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import slope_mm
from slope_mm.layers.substitution import with_tensors


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def test_no_thread_takes_back_what_another_one_reads() -> None:
    module = nn.Linear(2, 2)
    own, other = torch.ones(2, 2), torch.zeros(2, 2)
    entered = threading.Event()
    found = []

    def take() -> None:
        with with_tensors((module, 'weight', other)):
            found.append(module.weight.tolist())
            entered.set()

    with with_tensors((module, 'weight', own)):
        thread = threading.Thread(target=take)
        thread.start()
        # Long enough to come in, if nothing keeps it out.
        assert not entered.wait(0.3)
        assert module.weight.tolist() == own.tolist()
    thread.join()
    assert found == [other.tolist()]
    assert isinstance(module.weight, nn.Parameter)


def test_one_thread_may_be_in_several_scopes() -> None:
    outer, inner = nn.Linear(2, 2), nn.Linear(2, 2)
    with with_tensors((outer, 'weight', torch.ones(2, 2))):
        with with_tensors((inner, 'weight', torch.zeros(2, 2))):
            assert outer.weight.sum() == 4 and inner.weight.sum() == 0
        assert outer.weight.sum() == 4


class Served(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 16, 2, stride=2)
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        return self.last(self.up(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.usefixtures('hasty_threads')
def test_a_model_serves_several_threads_as_it_serves_one() -> None:
    torch.manual_seed(0)
    settings = dict(weight=dict(bits=3), activation=dict(bits=4))
    recipe = dict(settings, rules=[dict(match='re:.*', **settings)])
    model = slope_mm.convert(Served(), recipe).train()
    images = [torch.randn(1, 12, 16) for _ in range(8)]
    model(torch.cat(images))
    model.eval()
    assert all(layer.calibrated for layer in slope_mm.compressed_layers(model).values())

    @torch.no_grad()
    def answer(index: int) -> torch.Tensor:
        return model(images[index % 8])

    expected = [answer(index) for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(answer, range(1200)))
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(found))
