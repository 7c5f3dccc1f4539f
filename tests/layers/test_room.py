"""Evaluation: quantized inputs take turns in one piece of memory that nobody else gets to see."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import slope_mm
from slope_mm.layers.reuse import WeightReuse
from slope_mm.layers.room import InputRoom

A4 = dict(
    weight=dict(sparsity='2:4', bits=4),
    activation=dict(bits=4),
    rules=[dict(match='re:.*', weight=dict(bits=4), activation=dict(bits=4))],
)
OPERATORS = (F.linear, F.conv2d, torch.conv2d, F.conv_transpose2d, torch.conv_transpose2d)


class Branches(nn.Module):
    """Inputs that are used once more after they were quantized, of growing and shrinking sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        second = self.same(first) + first
        third = self.up(second)
        fourth = self.last(third.mean((2, 3)))
        return [first, second, third, fourth, self.same(second), second]


class Operands(TorchFunctionMode):
    """The first argument of every compressed operator, and where in memory they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in OPERATORS:
            # Held, so that an allocator does not give the same memory twice.
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))

    @property
    def places(self) -> list[int]:
        return [x.data_ptr() for x in self.seen]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = slope_mm.convert(Branches(), A4)
    model.train()(torch.randn(2, 8, 6, 6))
    assert all(layer.calibrated for layer in slope_mm.compressed_layers(model).values())
    return model.eval()


def as_it_is(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def with_gaps(x: Tensor) -> Tensor:
    return torch.cat((x, x), 1)[:, ::2]


@pytest.mark.parametrize('layout', [as_it_is, channels_last, with_gaps])
@pytest.mark.parametrize('scope', [torch.no_grad, torch.inference_mode])
def test_every_result_is_that_of_plain_layers(
    model: nn.Module, scope: Callable[[], Any], layout: Callable[[Tensor], Tensor]
) -> None:
    baked = slope_mm.bake(model, activations='fake_quant')
    for size in (6, 3, 11, 1, 6):
        x = layout(torch.randn(2, 8, size, size))
        before = x.clone()
        with scope():
            found, expected = model(x), baked(x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(x, before)


def test_results_outlive_the_next_forward(model: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        found = model(x)
        kept = [result.clone() for result in found]
        model(torch.randn(2, 8, 9, 9))
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_half_precision_has_the_values_of_new_memory(model: nn.Module) -> None:
    model.bfloat16()
    x = torch.randn(2, 8, 6, 6).bfloat16()
    with torch.no_grad():
        shared = model(x)
        # Its parts by themselves have no room.
        first = model.first(x)
        second = model.same(first) + first
    assert torch.equal(shared[0], first) and torch.equal(shared[1], second)


def test_layers_take_turns_in_the_same_memory(model: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        # The room has grown to what it needs.
        model(x)
        with Operands() as operands:
            model(x)
    assert len(operands.places) == 5
    assert len(set(operands.places)) == 1


def test_training_shares_no_memory(model: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model(x)
    with Operands() as operands:
        results = model.train()(x)
    assert len(set(operands.places)) == len(operands.places) == 5
    results[-1].sum().backward()
    with torch.no_grad(), Operands() as operands:
        # A part of the model opens no scope.
        held = [model.first(x), model.same(x)]
    assert len(held) == len(set(operands.places)) == 2


def room_of(model: nn.Module) -> InputRoom:
    hooks = [getattr(hook, '__self__', None) for hook in model._forward_pre_hooks.values()]
    (room,) = [hook._room for hook in hooks if isinstance(hook, WeightReuse)]
    return room


def held_bytes(model: nn.Module) -> int:
    return sum(memory.nbytes for memory in room_of(model)._bytes.values())


@pytest.mark.parametrize('in_step', [False, True])
def test_training_gives_the_memory_back(model: nn.Module, in_step: bool) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model(x)
    # The transposed convolution's result, twice as high and wide, is averaged before the last.
    assert held_bytes(model) == x.nbytes
    # As an optim wrapper's step marks the model.
    model.slope_in_step = in_step
    model.train()(x)
    assert held_bytes(model) == 0


def test_a_copy_shares_no_memory(model: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert held_bytes(copied) == 0
            found = copied(x)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert room_of(copied) is not room_of(model)


def test_gradients_within_an_evaluation_are_those_of_a_training_forward(model: nn.Module) -> None:
    """As visualizers of class activations ask for them."""
    x = torch.randn(2, 8, 6, 6)

    def with_gradients(*_: object) -> None:
        torch.set_grad_enabled(True)

    handle = model.first.register_forward_pre_hook(with_gradients)
    with torch.no_grad():
        model(x)[-1].square().sum().backward()
    handle.remove()
    found = model.first.weight.grad.clone()
    model.zero_grad()
    model(x)[-1].square().sum().backward()
    torch.testing.assert_close(found, model.first.weight.grad)


def test_a_room_grows_and_is_given_back() -> None:
    room = InputRoom()
    small = room(torch.empty(3, 4))
    assert small.shape == (3, 4) and small.data_ptr() == room(torch.empty(4, 3)).data_ptr()
    like = torch.empty(2, 3, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    large = room(like)
    assert (large.dtype, large.stride()) == (like.dtype, like.stride())
    assert large.data_ptr() == room(torch.empty(4, 3)).data_ptr() != small.data_ptr()
    assert room(torch.empty(0, 3)).shape == (0, 3)
    assert room(torch.empty(2, device='meta')).device.type == 'meta'
    room.release()
    # `large` still holds the memory that was given back.
    assert room(torch.empty(4, 3)).data_ptr() != large.data_ptr()


def test_threads_have_rooms_of_their_own() -> None:
    room = InputRoom()
    found = {}

    def take() -> None:
        found['other'] = room(torch.empty(3, 4))

    found['own'] = room(torch.empty(3, 4))
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert found['own'].data_ptr() != found['other'].data_ptr()
