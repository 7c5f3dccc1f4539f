"""State dicts of compressed layers: stock checkpoints, round trips, other recipes'."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
import torch
from layer_cases import W4, W4A4, Recipe, compress
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn

import slope_mm
from slope_mm import CheckpointError


class Net(nn.Module):
    """All kinds, a stem and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = wrappers.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu()))
        return self.fc(self.up(x).mean((2, 3)))


def torch_load(model: nn.Module, state: dict[str, Tensor]) -> None:
    keys = model.load_state_dict(state, strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys


def mmengine_load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Strict raises on missing, unexpected and mismatched keys alike."""
    mmengine_checkpoint.load_state_dict(model, copy.copy(state), strict=True)


LOADERS = [torch_load, mmengine_load]
Loader = Callable[[nn.Module, dict[str, Tensor]], None]


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('used', [False, True])
@pytest.mark.parametrize('held', [False, True])
def test_a_stock_checkpoint_loads_without_a_word(load: Loader, used: bool, held: bool) -> None:
    """Whatever state the model was in, it is as if its weights had been converted."""
    stock = Net()
    model = compress(Net(), W4A4)
    if used:
        model.train()(torch.randn(2, 3, 9, 9))
    if held:
        for layer in slope_mm.compressed_layers(model).values():
            layer.hold_mask()
    load(model, stock.state_dict())
    fresh = compress(copy.deepcopy(stock), W4A4)
    layers = slope_mm.compressed_layers(model)
    assert layers.keys() == slope_mm.compressed_layers(fresh).keys()
    for name, expected in slope_mm.compressed_layers(fresh).items():
        layer = layers[name]
        assert torch.equal(layer.step, expected.step)  # type: ignore[arg-type]
        assert torch.equal(layer.compressed_weight(), expected.compressed_weight())
        assert layer.slope_mask is None
        assert not layer.calibrated


@pytest.mark.parametrize('load', LOADERS)
def test_a_checkpoint_that_lacks_a_stock_key_is_still_incomplete(load: Loader) -> None:
    state = Net().state_dict()
    del state['conv.weight']
    state['conv.extra'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)conv\.extra') as raised:
        load(compress(Net(), W4A4), state)
    assert 'conv.weight' in str(raised.value)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('held', [False, True])
def test_a_round_trip_restores_everything(load: Loader, held: bool) -> None:
    model = compress(Net(), W4A4)
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter).abs()
    if held:
        for layer in slope_mm.compressed_layers(model).values():
            layer.hold_mask()
        with torch.no_grad():
            for layer in slope_mm.compressed_layers(model).values():
                layer.weight += 0.05 * torch.randn_like(layer.weight)
    saved = copy.deepcopy(model.state_dict())
    masks = [key for key in saved if key.endswith('slope_mask')]
    # The stem is dense.
    assert masks == (['conv.slope_mask', 'up.slope_mask', 'fc.slope_mask'] if held else [])

    other = compress(Net(), W4A4)
    other.conv.hold_mask()
    load(other, saved)
    assert other.state_dict().keys() == saved.keys()
    for key, value in other.state_dict().items():
        assert torch.equal(value, saved[key]), key
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(other.eval()(x), model.eval()(x))
    for layer in slope_mm.compressed_layers(other).values():
        assert layer.calibrated


def test_an_untouched_model_saves_usable_steps() -> None:
    """Before its first use, too."""
    model = compress(Net())
    state = model.state_dict()
    fresh = compress(Net())
    fresh.load_state_dict(state)
    for name, layer in slope_mm.compressed_layers(fresh).items():
        expected = slope_mm.compressed_layers(model)[name].step
        assert torch.equal(layer.slope_step, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
def test_a_head_for_other_classes_gets_steps_of_its_own(granularity: str) -> None:
    recipe = dict(weight=dict(sparsity='2:4', bits=4, step=granularity))
    trained = compress(Net(), recipe)
    with torch.no_grad():
        for layer in slope_mm.compressed_layers(trained).values():
            layer.step.mul_(2)  # type: ignore[union-attr]
    torch.manual_seed(1)
    net = Net()
    net.fc = nn.Linear(4, 20)
    wanted = compress(copy.deepcopy(net), recipe).fc.step
    model = compress(net, recipe)
    before = model.fc.weight.clone()
    # As a runner loads load_from: what does not fit is logged.
    mmengine_checkpoint.load_state_dict(model, trained.state_dict(), strict=False)
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.fc.step, wanted)
    assert torch.equal(model.conv.step, trained.conv.step)


def test_a_state_dict_that_does_not_speak_of_a_layer_leaves_it_alone() -> None:
    model = compress(Net(), W4A4)
    model(torch.randn(2, 3, 9, 9))
    model.conv.hold_mask()
    before = copy.deepcopy(model.state_dict())
    # torch 2.1 starts a batch norm's count anew where the state dict has none.
    count = {'norm.num_batches_tracked': before['norm.num_batches_tracked']}
    model.load_state_dict({'norm.bias': torch.zeros(8), **count}, strict=False)
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.conv.calibrated


OTHER_RECIPES: dict[str, Recipe] = {
    'pattern': dict(weight=dict(sparsity='2:8', bits=4), activation=dict(bits=4)),
    'dense': dict(weight=dict(bits=4), activation=dict(bits=4)),
    'bits': dict(weight=dict(sparsity='2:4', bits=3), activation=dict(bits=4)),
    'full precision': dict(weight=dict(sparsity='2:4'), activation=dict(bits=4)),
    'codes': dict(weight=dict(sparsity='2:4', bits=4, codes='odd'), activation=dict(bits=4)),
    'step': dict(weight=dict(sparsity='2:4', bits=4, step='tensor'), activation=dict(bits=4)),
    'activation': dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=8)),
    'no activation': W4,
    'order': dict(**W4A4, order='q_then_s'),
}


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('other', OTHER_RECIPES)
def test_another_recipes_checkpoint_is_refused(load: Loader, other: str) -> None:
    state = compress(nn.Sequential(nn.Linear(8, 8)), OTHER_RECIPES[other]).state_dict()
    model = compress(nn.Sequential(nn.Linear(8, 8)), W4A4)
    before = model[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"layer '0' was compressed as .*2:4 W4 A4 lsq"):
        load(model, state)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize('gradient', ['sr_ste', 'masked'])
def test_another_gradients_checkpoint_is_the_same_function(gradient: str) -> None:
    saved = compress(nn.Linear(8, 8), dict(**W4A4, gradient=gradient))
    loaded, x = compress(nn.Linear(8, 8), W4A4), torch.randn(4, 8)
    saved(x)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.eval()(x), saved.eval()(x))


def test_the_latent_weight_is_the_stock_key() -> None:
    stock = Net()
    expected = copy.deepcopy(stock.state_dict())
    model = compress(stock, W4A4)
    model(torch.randn(2, 3, 9, 9))
    stock_part = {k: v for k, v in model.state_dict().items() if 'slope_' not in k}
    assert list(stock_part) == list(expected)
    assert torch.equal(stock_part['conv.weight'], expected['conv.weight'])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_steps_stay_in_fp32_when_the_model_is_halved(dtype: torch.dtype) -> None:
    layer = compress(nn.Linear(16, 16), W4A4)
    layer(torch.randn(4, 16))
    before = {key: step.detach().clone() for key, step in layer.steps.items()}
    layer.eval().to(dtype)
    assert layer.weight.dtype == dtype
    for key, step in layer.steps.items():
        assert step.dtype == torch.float32
        assert torch.equal(step, before[key]), key
    x = torch.randn(4, 16, dtype=dtype)
    try:
        nn.functional.linear(x, torch.ones(16, 16, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f'this torch multiplies no {dtype} on a CPU: {error}')
    assert layer(x).dtype == dtype
