"""The swap: what it keeps, how masks move, and how copies and frozen layers fare."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import DENSE_W4, W4A4, any_kind, compress, compress_slowly, input_for, stock_layer
from mmcv.cnn.bricks import wrappers
from mmengine.model import BaseModule, ExponentialMovingAverage
from torch import Tensor, nn

import slope_mm
from slope_mm.layers import LAYER_KINDS, CompressedLayer, SlopeConv2d, stock_type
from slope_mm.ops import NMPattern, mse_init_step, weight_codes

# --- the swap ------------------------------------------------------------------------------------


@any_kind
def test_the_swap_keeps_object_parameters_and_hooks(kind: str) -> None:
    stock = stock_layer(kind)
    stock.anything = 'kept'  # type: ignore[assignment]
    calls: list[str] = []
    stock.register_forward_pre_hook(lambda *_: calls.append('before'))
    stock.register_forward_hook(lambda *_: calls.append('after'))
    weight, bias, stock_class = stock.weight, stock.bias, type(stock)
    layer = compress(stock)
    assert layer is stock
    assert layer.weight is weight and layer.bias is bias
    assert layer.anything == 'kept'
    layer(input_for(kind))
    assert calls == ['before', 'after']
    assert isinstance(layer, stock_class) and isinstance(layer, CompressedLayer)
    assert stock_type(layer) is stock_class


@any_kind
def test_the_stock_class_is_a_direct_base(kind: str) -> None:
    """mmengine's initialisers look at the names of the class and of its direct bases."""
    layer = compress(stock_layer(kind))
    assert LAYER_KINDS[stock_type(layer)] is type(layer)
    assert stock_type(layer) in type(layer).__bases__


def test_shared_modules_stay_shared() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = nn.Conv2d(8, 8, 3, padding=1)
            self.levels = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(8)) for _ in range(3)])

    model = compress(Heads())
    convs = [level[0] for level in model.levels]
    assert convs[0] is convs[1] is convs[2]
    assert isinstance(convs[0], SlopeConv2d)
    assert list(slope_mm.compressed_layers(model)) == ['levels.0.0']
    assert len(list(model.parameters())) == 2 + 1 + 3 * 2


class Initialised(BaseModule):
    """What mmdet's modules do: layers, and a config that says how to fill them."""

    def __init__(self, init_cfg: Any) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(8, 8, 3)
        self.wrapped = wrappers.Conv2d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(8, 8)


INITIALISERS = [
    dict(type='Constant', val=0.25, bias=0.5, layer=['Conv2d', 'ConvTranspose2d', 'Linear']),
    dict(type='Kaiming', layer=['Conv2d', 'ConvTranspose2d', 'Linear'], bias=0.5),
    dict(type='Xavier', layer=['Conv2d', 'ConvTranspose2d', 'Linear'], bias=0.5),
    dict(
        type='Normal',
        layer='Conv2d',
        std=3.0,
        bias=0.5,
        override=[
            dict(type='Normal', name='up', std=3.0, bias=0.5),
            dict(type='Xavier', name='fc', bias=0.5),
        ],
    ),
]


@pytest.mark.parametrize('init_cfg', INITIALISERS, ids=lambda cfg: cfg['type'])
@pytest.mark.parametrize('saved_first', [False, True])
def test_init_cfg_reaches_compressed_layers_and_steps_follow(
    init_cfg: dict[str, Any], saved_first: bool
) -> None:
    """As in the Runner: built and converted first, initialised later, perhaps saved between."""
    dense = Initialised(copy.deepcopy(init_cfg))
    model = compress(Initialised(copy.deepcopy(init_cfg)))
    if saved_first:
        model.state_dict()
    for module in (dense, model):
        torch.manual_seed(1)
        module.init_weights()
    own = {k: v for k, v in model.state_dict().items() if 'slope_' not in k}
    assert own.keys() == dense.state_dict().keys()
    for key, value in dense.state_dict().items():
        assert torch.equal(own[key], value), key
    for layer in slope_mm.compressed_layers(model).values():
        assert (layer.bias == 0.5).all()  # type: ignore[union-attr]
        step = mse_init_step(layer.weight, weight_codes('lsq', 4), layer.output_axis, layer.mask)
        assert torch.equal(layer.step, step)


def test_a_step_stays_as_learned_when_the_weight_moves() -> None:
    layer = compress(nn.Linear(8, 4))
    first = layer.step.detach().clone()
    with torch.no_grad():
        layer.weight *= 3
    assert torch.equal(layer.step, first)
    assert torch.equal(layer.state_dict()['slope_step'], first)


# --- masks over time -----------------------------------------------------------------------------


def test_a_mask_follows_the_weight_unless_held() -> None:
    layer = compress(nn.Linear(8, 4))
    before = layer.mask
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    assert not torch.equal(layer.mask, before)
    layer.hold_mask()
    held = layer.mask
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    assert torch.equal(layer.mask, held)
    assert torch.equal(layer.live_mask(), before)
    assert (layer.compressed_weight()[~held] == 0).all()
    layer.release_mask()
    assert torch.equal(layer.mask, before)


def test_first_steps_are_those_of_the_mask_that_is_held() -> None:
    layer = compress(nn.Linear(8, 4))
    layer.hold_mask()
    held = layer.mask.clone()
    with torch.no_grad():
        # What was pruned is the largest by now.
        layer.weight.mul_(torch.where(held, 1.0, 10.0))
    assert not torch.equal(layer.live_mask(), held)
    layer.initialise_step()
    wanted = mse_init_step(layer.weight, weight_codes('lsq', 4), 0, held)
    torch.testing.assert_close(layer.slope_step.detach(), wanted)


def test_a_ramp_uses_its_own_pattern_for_a_while() -> None:
    layer = compress(nn.Linear(8, 4), dict(weight=dict(sparsity='1:4')))
    for pattern, kept in ((None, 32), (NMPattern(3, 4), 24), (NMPattern(1, 4), 8)):
        layer.set_pattern(pattern)
        assert int((layer.compressed_weight() != 0).sum()) == kept
        assert (layer.mask is None) == (pattern is None)


def test_dense_layers_have_no_mask() -> None:
    layer = compress(nn.Linear(8, 4), DENSE_W4)
    assert layer.mask is None and layer.live_mask() is None
    layer.hold_mask()
    assert layer.mask is None and 'slope_mask' not in layer.state_dict()


# --- copies --------------------------------------------------------------------------------------


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def torch_saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled, torch_saved])
@any_kind
def test_copies_compute_the_same_and_live_their_own_lives(
    kind: str, copied: Callable[[nn.Module], Any]
) -> None:
    layer, x = compress(stock_layer(kind), W4A4), input_for(kind)
    layer(x).sum().backward()
    layer.hold_mask()
    # In the middle of a step, with a graph on the shared weight.
    with layer.shared():
        expected = layer(x)
        other = copied(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(x), expected)
    assert torch.equal(other.mask, layer.mask)
    assert other.state_dict().keys() == layer.state_dict().keys()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    other.release_mask()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


def test_a_copy_made_within_a_scope_is_outside_of_it() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        layer.compressed_weight()
        other = copy.deepcopy(layer)
    other.compressed_weight()
    with torch.no_grad():
        other.weight.neg_()
    assert torch.equal(other.compressed_weight(), compress_slowly(other))


def test_a_moving_average_keeps_its_averaged_steps() -> None:
    """mmengine's EMA copies the model before training and writes to parameters from outside."""
    model = compress(nn.Sequential(nn.Linear(8, 8)), W4A4)
    average = ExponentialMovingAverage(model, momentum=0.5)
    steps = []
    for factor in (1.0, 3.0):
        model(torch.randn(4, 8))
        with torch.no_grad():
            model[0].slope_step *= factor
            model[0].slope_act_step *= factor
        steps.append(model[0].slope_step.detach().clone())
        average.update_parameters(model)
    expected = (steps[0] + steps[1]) / 2
    saved = average.state_dict()
    torch.testing.assert_close(saved['module.0.slope_step'], expected)
    layer = average.module[0]
    torch.testing.assert_close(layer.step, expected)
    assert layer.calibrated and layer.activation_signed is True
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), F.linear(x, layer.compressed_weight(), layer.bias))


@pytest.mark.parametrize('compressed', [False, True])
def test_a_model_built_without_memory_takes_a_checkpoint_as_its_own(compressed: bool) -> None:
    """Large models are built on ``meta``; a stock checkpoint brings nothing of the compression."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))

    def forward(model: Any) -> Tensor:
        return model[1](*[model[0](x)] * 3)[0]

    stock, x = build(), torch.randn(3, 2, 8)
    wanted = compress(copy.deepcopy(stock), W4A4)
    if compressed:
        forward(wanted.train())
    with torch.device('meta'):
        model = build()
    compress(model, W4A4)
    given = copy.deepcopy(wanted if compressed else stock).state_dict()
    model.load_state_dict(given, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert list(model.state_dict()) == list(wanted.state_dict())
    assert torch.equal(forward(model.train()), forward(wanted.train()))
    assert model[0].activation_signed is True


def test_a_model_that_was_given_memory_afterwards_begins_as_any_other() -> None:
    """``to_empty`` leaves what the memory held before, which no stock checkpoint writes over."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    stock, x = build(), torch.randn(3, 8)
    wanted = compress(copy.deepcopy(stock), W4A4)
    with torch.device('meta'):
        model = build()
    compress(model, W4A4)
    model.to_empty(device='cpu')
    for layer in model:
        for key in ('slope_step', 'slope_act_step'):
            getattr(layer, key).data.fill_(float('nan'))
        for key in ('slope_layer', 'slope_act_signed'):
            getattr(layer, key).fill_(77)
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model.train()(x), wanted.train()(x))
    saved = model.state_dict()
    compress(build(), W4A4).load_state_dict(saved)
    assert all(torch.equal(saved[key], value) for key, value in wanted.state_dict().items())


# --- frozen layers, devices of low precision -----------------------------------------------------


def test_steps_of_frozen_weights_are_frozen() -> None:
    stock = nn.Linear(8, 8)
    stock.requires_grad_(False)
    layer = compress(stock, W4A4)
    assert [p.requires_grad for p in layer.parameters()] == [False] * 4
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_a_layer_frozen_after_conversion_computes_on() -> None:
    """What ``ResNet.train()`` does to its first stages."""
    layer = compress(nn.Linear(8, 8), W4A4)
    expected = layer(torch.ones(2, 8))
    layer.requires_grad_(False)
    with layer.shared():
        assert torch.equal(layer(torch.ones(2, 8)), expected)
        assert not layer.compressed_weight().requires_grad


@any_kind
def test_autocast_computes_in_bfloat16_with_an_fp32_compression(kind: str) -> None:
    layer, x = compress(stock_layer(kind)), input_for(kind)
    stock = stock_layer(kind)
    with torch.no_grad():
        stock.weight.copy_(layer.compressed_weight())  # type: ignore[operator]
        stock.bias.copy_(layer.bias)  # type: ignore[operator]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        weight = layer.compressed_weight()
        y, expected = layer(x), stock(x)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, layer.compressed_weight())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_autocast_with_quantized_inputs() -> None:
    layer = compress(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), W4A4)
    x = torch.randn(64, 8)
    layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_model_in_half_precision_still_compresses() -> None:
    layer = compress(nn.Linear(8, 8)).to(torch.bfloat16)
    weight = layer.compressed_weight()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight != 0, (weight != 0) & layer.mask)


def layer_of_zeros(codes: str) -> Any:
    layer = compress(nn.Linear(16, 4), dict(weight=dict(sparsity=None, bits=8, codes=codes)))
    with torch.no_grad():
        layer.weight.zero_()
    return layer


@pytest.mark.parametrize('codes', ['lsq', 'symmetric', 'odd'])
def test_a_layer_of_zeros_computes_zeros(codes: str) -> None:
    assert float(layer_of_zeros(codes).compressed_weight().abs().max()) < 1e-6


# `odd` has no level of zero: any step but the smallest would make something of nothing there, so
# that its step has to grow at once when the weights do.
@pytest.mark.parametrize('codes', ['lsq', 'symmetric', 'odd'])
def test_a_layer_of_zeros_learns(codes: str) -> None:
    layer = layer_of_zeros(codes)
    x = torch.randn(64, 16)
    target = x @ torch.randn(16, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # As the optimizer wrapper does.
        layer.leave_zero()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ('make', 'fan_in'),
    [
        (lambda: nn.Conv2d(8, 6, 3), 72),
        (lambda: nn.Linear(8, 6), 8),
        (lambda: nn.ConvTranspose2d(8, 6, 2), 32),
    ],
    ids=['conv', 'linear', 'transposed conv'],
)
def test_a_usual_step_is_that_of_a_usual_initialisation(
    make: Callable[[], nn.Module], fan_in: int
) -> None:
    """The largest level is the standard deviation of weights that keep their input's variance."""
    stock = make()
    nn.init.zeros_(stock.weight)
    layer = compress(stock, DENSE_W4)
    step = layer.step.detach()
    torch.testing.assert_close(7 * step, torch.full_like(step, fan_in**-0.5))


def test_a_step_that_does_not_learn_is_left_asleep() -> None:
    layer = compress(nn.Linear(16, 4), dict(weight=dict(bits=4, codes='odd')))
    nn.init.zeros_(layer.weight)
    before = layer.step.detach().clone()
    layer.slope_step.requires_grad_(False)
    nn.init.ones_(layer.weight)
    layer.leave_zero()
    assert torch.equal(layer.slope_step, before)
    layer.slope_step.requires_grad_(True)
    layer.leave_zero()
    assert not torch.equal(layer.slope_step, before)
