"""Evaluation: each compressed weight is computed once, and anew after every change of W."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn

import slope_mm
from slope_mm.layers import CompressedLayer, base
from slope_mm.layers.reuse import _projections_at_once

RECIPE = dict(weight=dict(sparsity='2:4', bits=4), rules=[dict(match='re:.*', weight=dict(bits=4))])


class TwiceNet(nn.Module):
    """A layer that is used by two levels, and one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.head(x), self.head(x[..., ::2, ::2])]
        return self.last(sum(level.mean((2, 3)) for level in levels))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = slope_mm.convert(TwiceNet(), RECIPE).eval()
    for layer in slope_mm.compressed_layers(model).values():
        assert layer.step is not None
    return model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often a weight was compressed, through the one function that does it."""
    calls: list[int] = []
    compress = base.compress_with_powers

    def counting(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return compress(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(base, 'compress_with_powers', counting)
    yield calls


@torch.no_grad()
def reference(model: nn.Module, x: Tensor) -> Tensor:
    """The baked model: plain layers, nothing to go stale."""
    return slope_mm.bake(model)(x)


def layers_of(model: nn.Module) -> list[CompressedLayer]:
    return list(slope_mm.compressed_layers(model).values())


def test_many_forwards_compress_each_weight_once(model: nn.Module, counted: list[int]) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        first = model(x)
        assert len(counted) == 2
        for _ in range(3):
            assert torch.equal(model(x), first)
    assert len(counted) == 2


def negate(model: nn.Module) -> None:
    layers_of(model)[0].weight.data.neg_()


def swap_two_weights(model: nn.Module) -> None:
    weight = layers_of(model)[0].weight.data
    weight[0, 0], weight[1, 3] = weight[1, 3].clone(), weight[0, 0].clone()


def one_weight(model: nn.Module) -> None:
    layers_of(model)[1].weight.data[3, 3] += 1.0


def update(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        layers_of(model)[1].weight.mul_(0.5)


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items() if 'slope_' not in k})


def swap_with_average(model: nn.Module) -> None:
    """As mmengine's EMAHook does before an evaluation: through ``.data``."""
    average = ExponentialMovingAverage(model)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(-1.5)
    for parameter, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        held = parameter.data.clone()
        parameter.data.copy_(mean.data)
        mean.data.copy_(held)


def other_step(model: nn.Module) -> None:
    step = layers_of(model)[0].slope_step
    assert step is not None
    step.data[2] *= 1.7


def hold_another_mask(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.hold_mask()
        assert layer.slope_mask is not None
        layer.slope_mask.copy_(layer.slope_mask.roll(1, 1))


def flip_a_held_mask_in_place(model: nn.Module) -> None:
    layer = layers_of(model)[1]
    assert layer.slope_mask is not None
    layer.slope_mask.data.copy_(layer.slope_mask.roll(1, 1))


@pytest.mark.parametrize(
    'change',
    [
        negate,
        swap_two_weights,
        one_weight,
        update,
        load,
        swap_with_average,
        other_step,
        hold_another_mask,
        flip_a_held_mask_in_place,
    ],
)
def test_every_change_shows_at_once(model: nn.Module, change: Callable[[nn.Module], None]) -> None:
    x = torch.randn(2, 8, 6, 6)
    if change is flip_a_held_mask_in_place:
        for layer in layers_of(model):
            layer.hold_mask()
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(model, x))


@pytest.mark.parametrize('which', range(4))
@pytest.mark.parametrize('place', [0, 12345, -1])
def test_the_way_of_gpus_sees_every_change_as_well(which: int, place: int) -> None:
    """By few calls; small weights may lie beside large ones."""
    generator = torch.Generator().manual_seed(0)
    sizes, scales = (20000, 3 * 65536 + 20000, 65536, 80000), (1e-4, 1e3, 1.0, 1e-4)
    tensors = [
        torch.randn(size, generator=generator) * scale
        for size, scale in zip(sizes, scales, strict=True)
    ]
    before = torch.cat(_projections_at_once(tensors))
    assert before.numel() < 65536 * 2
    assert torch.equal(torch.cat(_projections_at_once(tensors)), before)
    # By a hundredth of its tensor's scale, as an update would.
    tensors[which][place] += 0.01 * scales[which]
    assert not torch.equal(torch.cat(_projections_at_once(tensors)), before)


def test_parts_of_a_model_never_see_a_kept_weight(model: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model(x)
        negate(model)
        assert torch.equal(model.head(x), slope_mm.bake(model).head(x))


def test_training_in_between_keeps_its_gradients(model: nn.Module, counted: list[int]) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model(x)
    model.train()(x).sum().backward()
    assert all(layer.weight.grad is not None for layer in layers_of(model))
    # Twice for the head: without an optim wrapper's scope nothing is shared in training.
    assert len(counted) == 2 + 3


def test_an_error_in_a_forward_leaves_no_scope_open(model: nn.Module) -> None:
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 6, 6))
        assert not any(layer.sharing for layer in layers_of(model))
        x = torch.randn(2, 8, 6, 6)
        negate(model)
        assert torch.equal(model(x), reference(model, x))


@pytest.mark.parametrize('trained', [False, True])
def test_a_forward_that_was_interrupted_leaves_nothing_stale(
    model: nn.Module, trained: bool
) -> None:
    x = torch.randn(2, 8, 6, 6)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        handle = model.last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
    if trained:
        for _ in range(2):
            # A kept graph could not be gone through twice.
            model(x).sum().backward()
    with torch.no_grad():
        model(x)
        negate(model)
        assert torch.equal(model(x), reference(model, x))
    assert not any(layer.sharing for layer in layers_of(model))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_kept_weight_is_of_the_models_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    # Weights that bf16 holds exactly: their values do not change with the dtype.
    model.bfloat16().float()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model(x)
        assert model.to(dtype)(x.to(dtype)).dtype == dtype


def test_what_inference_mode_has_kept_is_not_used_outside(model: nn.Module) -> None:
    x = torch.rand(2, 8, 6, 6)
    with torch.inference_mode():
        first = model(x)
        assert torch.equal(model(x), first)
    with torch.no_grad():
        assert torch.equal(model(x), first)
        assert torch.equal(model(x), first)
    with torch.inference_mode():
        assert torch.equal(model(x), first)
    model.train()
    model(x).sum().backward()


def test_copies_start_without_what_was_kept(model: nn.Module, counted: list[int]) -> None:
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            counted.clear()
            assert torch.equal(copied(x), expected)
            assert len(counted) == 2
            negate(copied)
            assert not torch.equal(copied(x), expected)
        assert torch.equal(model(x), expected)


def test_a_baked_model_has_no_hooks(model: nn.Module) -> None:
    baked = slope_mm.bake(model)
    assert not baked._forward_pre_hooks and not baked._forward_hooks
