"""Compressed layers: what the swap keeps, what forward computes, what a state dict means."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import ConvModule, wrappers
from mmengine.model import BaseModule, ExponentialMovingAverage, Sequential
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slope_mm
from slope_mm import CheckpointError, SlopeError, TensorError
from slope_mm.layers import (
    LAYER_KINDS,
    CompressedLayer,
    SlopeConv2d,
    SlopeConvTranspose2d,
    SlopeLinear,
    shared_weights,
    stock_type,
)
from slope_mm.ops import NMPattern, mse_init_step, nm_mask, weight_codes

W4 = dict(weight=dict(sparsity='2:4', bits=4))
W4A4 = dict(**W4, activation=dict(bits=4))
DENSE_W4 = dict(weight=dict(bits=4))
Recipe = dict[str, Any]

# A stock layer of each kind and an input for it.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'conv': (lambda: nn.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    'linear': (lambda: nn.Linear(8, 6), (5, 8)),
    'transposed conv': (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), (2, 8, 5, 5)),
    'mmcv conv': (lambda: wrappers.Conv2d(8, 6, 3), (2, 8, 7, 7)),
    'mmcv linear': (lambda: wrappers.Linear(8, 6), (5, 8)),
    'mmcv transposed conv': (lambda: wrappers.ConvTranspose2d(8, 6, 2), (2, 8, 5, 5)),
}
any_kind = pytest.mark.parametrize('kind', KINDS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stock_layer(kind: str) -> nn.Module:
    return KINDS[kind][0]()


def input_for(kind: str) -> Tensor:
    return torch.randn(KINDS[kind][1])


def compress(module: nn.Module, recipe: Recipe = W4) -> Any:
    return slope_mm.convert(module, recipe)


def graph_nodes(tensor: Tensor, name: str) -> int:
    """How many operations of this name a result was computed with."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return sum(name in node.name() for node in seen)


def kept_input_channels(layer: CompressedLayer, m: int) -> set[int]:
    """How many weights each aligned group of input channels keeps."""
    kept = (layer.compressed_weight() != 0).movedim(layer.input_axis, -1)
    return {int(count) for count in kept.unflatten(-1, (-1, m)).sum(-1).flatten()}


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


# --- forward -------------------------------------------------------------------------------------

# Every option that a stock layer has, with a recipe that fits it.
FORWARDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Recipe]] = {
    **{kind: (*case, W4) for kind, case in KINDS.items()},
    'stride, padding, dilation': (
        lambda: nn.Conv2d(8, 6, 3, stride=2, padding=(2, 1), dilation=2),
        (2, 8, 9, 11),
        W4,
    ),
    'same padding': (lambda: nn.Conv2d(8, 6, 3, padding='same'), (2, 8, 6, 6), W4),
    'reflect': (
        lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode='reflect'),
        (2, 8, 6, 6),
        W4,
    ),
    'circular': (
        lambda: nn.Conv2d(8, 6, (3, 1), padding=(1, 0), padding_mode='circular', bias=False),
        (2, 8, 6, 6),
        W4,
    ),
    'groups': (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 6, 6), DENSE_W4),
    'depthwise': (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), DENSE_W4),
    'no bias': (lambda: nn.Linear(8, 6, bias=False), (2, 3, 8), W4),
    'transposed, options': (
        lambda: nn.ConvTranspose2d(
            8, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=False
        ),
        (2, 8, 5, 6),
        W4,
    ),
    'transposed, groups': (
        lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
        (2, 8, 5, 5),
        DENSE_W4,
    ),
    'unstructured, odd, per tensor': (
        lambda: nn.Conv2d(5, 6, 3),
        (2, 5, 6, 6),
        dict(weight=dict(sparsity='unstructured:0.3', bits=3, codes='odd', step='tensor')),
    ),
    'sparse alone': (lambda: nn.Conv2d(8, 6, 3), (2, 8, 6, 6), dict(weight=dict(sparsity='1:8'))),
}


@pytest.mark.parametrize('case', FORWARDS)
def test_forward_is_the_stock_layer_with_the_compressed_weight(case: str) -> None:
    make, shape, recipe = FORWARDS[case]
    stock, x = make(), torch.randn(shape)
    layer = compress(copy.deepcopy(stock), recipe)
    with torch.no_grad():
        stock.weight.copy_(layer.compressed_weight())  # type: ignore[operator]
    assert not torch.equal(stock.weight, layer.weight)  # type: ignore[arg-type]
    x.requires_grad_()
    expected, measured = stock(x), layer(x)
    assert torch.equal(measured, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (expected, measured)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize('output_size', [[9, 9], (10, 9), [2, 6, 10, 10]])
def test_a_transposed_convolution_takes_an_output_size(output_size: Any) -> None:
    stock, x = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 5, 5)
    layer = compress(copy.deepcopy(stock))
    with torch.no_grad():
        stock.weight.copy_(layer.compressed_weight())
    expected = stock(x, output_size)
    assert tuple(expected.shape[2:]) == tuple(output_size[-2:])
    assert torch.equal(layer(x, output_size), expected)
    assert torch.equal(layer(x, output_size=output_size), expected)
    with pytest.raises(ValueError, match='output size'):
        layer(x, output_size=[90, 90])


@any_kind
def test_the_gradient_of_the_weight_passes_straight_through(kind: str) -> None:
    layer, x = compress(stock_layer(kind)), input_for(kind)
    upstream = torch.randn_like(layer(x))
    layer(x).backward(upstream)
    stock = stock_layer(kind)
    with torch.no_grad():
        stock.weight.copy_(layer.compressed_weight())  # type: ignore[operator]
        stock.bias.copy_(layer.bias)  # type: ignore[operator]
    stock(x).backward(upstream)
    mask, codes = layer.mask, weight_codes('lsq', 4)
    scaled = layer.weight / layer.step
    open_range = (scaled > codes.qn) & (scaled < codes.qp) | ~mask
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad * open_range)  # type: ignore[operator]
    torch.testing.assert_close(layer.bias.grad, stock.bias.grad)
    assert layer.slope_step.grad is not None and (layer.slope_step.grad != 0).any()


def test_the_steps_gradient_is_scaled_by_the_kept_weights_of_a_channel() -> None:
    """LSQ's 1 / sqrt(n Qp), n being what shares the step and is not zero by pattern."""
    for step, kept in (('channel', 16 * 9 // 2), ('tensor', 6 * 16 * 9 // 2)):
        layer = compress(nn.Conv2d(16, 6, 3), dict(weight=dict(sparsity='2:4', bits=4, step=step)))
        layer.compressed_weight().backward(torch.ones_like(layer.weight))
        v = (layer.weight / layer.slope_step).detach()
        slope = torch.where((v > -8) & (v < 7), v.round() - v, v.clamp(-8, 7)) * layer.mask
        expected = slope.sum_to_size(layer.slope_step.shape) / math.sqrt(kept * 7)
        torch.testing.assert_close(layer.slope_step.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('kind', ['transposed conv', 'mmcv transposed conv'])
def test_axes_of_transposed_convolutions(kind: str) -> None:
    """[in, out, R, S]: groups along the first axis, steps along the second."""
    layer = compress(stock_layer(kind))
    assert layer.slope_step.shape == (1, 6, 1, 1)
    assert torch.equal(layer.mask, nm_mask(layer.weight, 2, 4, dim=0))
    assert kept_input_channels(layer, 4) <= {0, 1, 2}
    assert not torch.equal(layer.mask, nm_mask(torch.ones(8, 8), 2, 4)[:, :6, None, None])


@pytest.mark.parametrize('kind', ['conv', 'linear', 'mmcv conv', 'mmcv linear'])
def test_axes_of_the_other_kinds(kind: str) -> None:
    layer = compress(stock_layer(kind))
    assert layer.slope_step.shape == (6, *[1] * (layer.weight.dim() - 1))
    assert torch.equal(layer.mask, nm_mask(layer.weight, 2, 4, dim=1))
    assert kept_input_channels(layer, 4) <= {0, 1, 2}


def test_the_order_is_sparsify_first_unless_told() -> None:
    weight = dict(sparsity='2:4', bits=2)
    for order in ('s_then_q', 'q_then_s'):
        layer = compress(nn.Linear(16, 32), dict(weight=weight, order=order))
        w, s = layer.weight.detach().numpy(), layer.step.detach().numpy()
        quantized = np.clip(np.rint(w / s), -2, 1) * s
        ranked = w if order == 's_then_q' else quantized
        expected = np.zeros_like(w)
        for row in range(32):
            for first in range(0, 16, 4):
                best = sorted(range(first, first + 4), key=lambda k: -abs(ranked[row, k]))[:2]
                expected[row, best] = quantized[row, best]
        np.testing.assert_allclose(layer.compressed_weight().detach().numpy(), expected, rtol=1e-6)
    assert not np.array_equal(quantized != 0, layer.mask.numpy())


def test_the_two_orders_differ() -> None:
    """Ties between coarse codes go to the lower index, not to the larger weight."""
    dense, results = nn.Linear(16, 32), {}
    for order in ('s_then_q', 'q_then_s'):
        recipe = dict(weight=dict(sparsity='2:4', bits=2), order=order)
        layer = compress(copy.deepcopy(dense), recipe)
        results[order] = layer.compressed_weight()
    assert not torch.equal(*results.values())


def test_sr_ste_decays_pruned_weights_in_proportion_to_the_losses_factor() -> None:
    """The decay is no part of the loss: what multiplies losses has to multiply it."""
    layer = compress(nn.Linear(8, 4), dict(**W4, gradient='sr_ste'))
    pruned = ~layer.mask
    for factor in (1.0, 0.25, 1024.0):
        layer.weight.grad, layer.loss_factor = None, factor
        (0 * layer(torch.randn(2, 8))).sum().backward()
        expected = torch.where(pruned, layer.weight * 2e-4 * factor, 0.0)
        torch.testing.assert_close(layer.weight.grad, expected)


def test_masked_gradients_leave_pruned_weights_alone() -> None:
    layer = compress(nn.Linear(8, 4), dict(**W4, gradient='masked'))
    layer(torch.randn(2, 8)).sum().backward()
    assert (layer.weight.grad[~layer.mask] == 0).all()
    assert (layer.weight.grad[layer.mask] != 0).any()


def test_a_weight_of_nan_is_refused_where_it_is_used() -> None:
    layer = compress(nn.Linear(8, 4))
    layer(torch.randn(2, 8))
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(TensorError, match='holds 1 NaN or infinite'):
        layer(torch.randn(2, 8))


@pytest.mark.parametrize('make', [lambda: nn.Linear(4, 1), lambda: nn.Conv2d(4, 1, 1)])
def test_layers_of_one_output(make: Callable[[], nn.Module]) -> None:
    layer = compress(make(), W4A4)
    x = torch.randn(3, 4, *[2] * (layer.weight.dim() - 2))
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_zero_weights_compute_zero_and_learn() -> None:
    layer = compress(nn.Linear(8, 4, bias=False))
    nn.init.zeros_(layer.weight)
    assert (layer(torch.randn(3, 8)) == 0).all()
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad.isfinite().all() and (layer.weight.grad != 0).any()


def test_codes_times_step_are_the_compressed_weight() -> None:
    for name, offset in (('lsq', 0.0), ('symmetric', 0.0), ('odd', 0.5)):
        layer = compress(nn.Conv2d(8, 4, 3), dict(weight=dict(sparsity='2:4', bits=3, codes=name)))
        codes = layer.codes()
        assert codes.dtype == torch.int16 and codes.shape == layer.weight.shape
        values = (codes + offset) * layer.step * layer.mask
        torch.testing.assert_close(values, layer.compressed_weight())
        assert (codes[~layer.mask] == 0).all()
        assert len(torch.unique(codes[layer.mask])) <= 8


def test_a_layer_without_weight_bits_has_no_codes() -> None:
    layer = compress(nn.Linear(8, 4), dict(weight=dict(sparsity='2:4')))
    assert layer.step is None
    with pytest.raises(TensorError, match='no codes; set weight bits'):
        layer.codes()


def test_the_printed_model_says_how_it_is_compressed() -> None:
    assert 'slope=2:4 W4 A4' in repr(compress(nn.Sequential(nn.Linear(8, 4)), W4A4))


def test_efficient_conv_bn_eval_is_refused() -> None:
    """It scales the latent weight before the layer could compress it."""
    module = ConvModule(8, 8, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True)
    model = compress(nn.Sequential(module))
    model(torch.randn(1, 8, 5, 5))
    with pytest.raises(SlopeError, match='remove efficient_conv_bn_eval'):
        model.eval()(torch.randn(1, 8, 5, 5))


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


# --- computing the compressed weight once --------------------------------------------------------


def test_a_scope_computes_the_weight_once() -> None:
    layer, x = compress(nn.Linear(8, 8)), torch.randn(2, 8)
    alone = layer(layer(layer(x)))
    assert graph_nodes(alone, 'MaskedQuantize') == 3
    alone.sum().backward()
    gradients = [layer.weight.grad, layer.slope_step.grad]
    layer.zero_grad()
    with layer.shared():
        together = layer(layer(layer(x)))
    assert graph_nodes(together, 'MaskedQuantize') == 1
    assert torch.equal(together, alone)
    together.sum().backward()
    torch.testing.assert_close([layer.weight.grad, layer.slope_step.grad], gradients)


def test_the_regularizer_shares_the_scopes_weight() -> None:
    model, x = compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), torch.randn(2, 8)
    with shared_weights(model):
        loss = model(x).sum() + slope_mm.regularization(model, gradient='ste')
    assert graph_nodes(loss, 'MaskedQuantize') == 2
    assert graph_nodes(model(x).sum() + slope_mm.regularization(model), 'MaskedQuantize') == 2


def test_after_a_scope_the_weight_is_computed_anew() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        before = layer.compressed_weight()
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.compressed_weight(), compress_slowly(layer))
    with layer.shared():
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))
    assert not torch.equal(layer.compressed_weight(), before)


def compress_slowly(layer: CompressedLayer) -> Tensor:
    """The LSQ formula at 4 bits on the layer's own step and the weight's 2:4 mask."""
    assert layer.slope_step is not None
    mask = nm_mask(layer.weight, 2, 4, layer.input_axis)
    return (layer.weight / layer.slope_step).round().clamp(-8, 7) * layer.slope_step * mask


def test_a_new_scope_drops_what_an_unclosed_one_left() -> None:
    layer = compress(nn.Linear(8, 8))
    layer.begin_sharing()
    layer.compressed_weight()
    with torch.no_grad():
        layer.weight.neg_()
    layer.begin_sharing()
    assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


def test_a_scope_closes_after_an_error() -> None:
    model = compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(ZeroDivisionError), shared_weights(model):
        model(torch.randn(2, 8))
        raise ZeroDivisionError
    for layer in model:
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


def test_a_scope_serves_passes_with_and_without_gradients() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        with torch.no_grad():
            assert not layer.compressed_weight().requires_grad
        assert layer.compressed_weight().requires_grad
        with torch.no_grad():
            assert not layer.compressed_weight().requires_grad
        layer.compressed_weight().sum().backward()
    assert layer.weight.grad is not None


def test_a_scope_notices_masks_and_checkpoints() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        layer.compressed_weight()
        layer.set_pattern(NMPattern(1, 4))
        assert int((layer.compressed_weight() != 0).sum()) <= 16
        layer.set_pattern(NMPattern(2, 4))
        layer.compressed_weight()
        layer.load_state_dict(nn.Linear(8, 8).state_dict())
        layer.compressed_weight()
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """``with_cp=True`` of mmdet's backbones. The scope ends before the backward pass."""
    model = compress(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    x = torch.randn(2, 8, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        for layer in slope_mm.compressed_layers(model).values():
            layer.runs = 0
        with shared_weights(slope_mm.compressed_layers(model).values()):
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            loss = y.square().sum() + slope_mm.regularization(model)
        # The regularizer asks who ran before the backward pass runs them again.
        assert [layer.runs for layer in slope_mm.compressed_layers(model).values()] == [1, 1]
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


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


# --- state dicts ---------------------------------------------------------------------------------


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


def test_a_state_dict_that_does_not_speak_of_a_layer_leaves_it_alone() -> None:
    model = compress(Net(), W4A4)
    model(torch.randn(2, 3, 9, 9))
    model.conv.hold_mask()
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict({'norm.bias': torch.zeros(8)}, strict=False)
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
    state = compress(nn.Linear(8, 8), dict(**W4A4, gradient=gradient)).state_dict()
    compress(nn.Linear(8, 8), W4A4).load_state_dict(state)


def test_the_latent_weight_is_the_stock_key() -> None:
    stock = Net()
    expected = copy.deepcopy(stock.state_dict())
    model = compress(stock, W4A4)
    model(torch.randn(2, 3, 9, 9))
    stock_part = {k: v for k, v in model.state_dict().items() if 'slope_' not in k}
    assert list(stock_part) == list(expected)
    assert torch.equal(stock_part['conv.weight'], expected['conv.weight'])


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


# --- quantized inputs ----------------------------------------------------------------------------


def activation_layer(bits: int = 4) -> Any:
    """A layer whose weight is its identity, so that its output is its quantized input."""
    layer = compress(nn.Linear(4, 4, bias=False), dict(weight={}, activation=dict(bits=bits)))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    return layer


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('signed', [False, True])
def test_the_first_training_batch_calibrates_range_and_sign(bits: int, signed: bool) -> None:
    layer = activation_layer(bits)
    x = torch.randn(500, 4)
    x = x if signed else x.relu()
    assert not layer.calibrated and layer.activation_signed is None
    y = layer(x)
    assert layer.calibrated and layer.activation_signed is signed
    assert int(layer.slope_act_signed) == int(signed)
    step = layer.slope_act_step.item()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = np.clip(np.rint(x.numpy() / np.float32(step)), low, high) * np.float32(step)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6)
    # The step is a good one: no clip range of a fine grid is much better.
    errors = []
    for share in np.linspace(0.02, 1.1, 150):
        s = share * float(x.abs().max()) / high
        errors.append(
            float(((np.clip(np.rint(x.numpy() / s), low, high) * s - x.numpy()) ** 2).mean())
        )
    assert float((y - x).detach().square().mean()) <= 1.25 * min(errors)


def test_a_calibrated_range_is_kept() -> None:
    layer = activation_layer()
    layer(torch.rand(50, 4))
    step = layer.slope_act_step.item()
    layer(100 * torch.randn(50, 4))
    assert layer.slope_act_step.item() == step and layer.activation_signed is False


def test_an_uncalibrated_layer_passes_inputs_through_in_evaluation() -> None:
    layer, x = activation_layer().eval(), torch.randn(5, 4)
    assert torch.equal(layer(x), x)
    assert not layer.calibrated


def test_empty_inputs_neither_calibrate_nor_fail() -> None:
    """No RoI in any image of the batch."""
    layer = activation_layer()
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    assert not layer.calibrated
    layer(torch.rand(9, 4))
    empty = torch.zeros(0, 4, requires_grad=True)
    layer(empty).sum().backward()
    assert layer.slope_act_step.grad.item() == 0


def test_the_input_step_learns_by_lsq() -> None:
    """Scaled by the features of one sample: losses are means over the batch."""
    layer = activation_layer()
    layer(torch.randn(50, 4))
    x, upstream = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    with torch.no_grad():
        layer.slope_act_step.fill_(0.2)
    layer(x).backward(upstream)
    v = x / 0.2
    slope = torch.where((v > -8) & (v < 7), v.round() - v, v.clamp(-8, 7))
    expected = (upstream * slope).sum() / math.sqrt(5 * 4 * 7)
    assert layer.slope_act_step.grad.item() == pytest.approx(expected.item(), rel=1e-3)


def test_observing_passes_inputs_through_and_gathers_them() -> None:
    layer = activation_layer()
    layer.begin_observing()
    first, second = torch.rand(30, 4), torch.rand(20, 4) - 0.5
    assert torch.equal(layer(first), first)
    layer(torch.zeros(0, 4))
    layer(second)
    assert not layer.calibrated
    observer = layer.end_observing()
    assert observer.seen
    assert observer.low.item() == min(first.min().item(), second.min().item())
    seen = set(torch.cat(observer.samples).tolist())
    assert seen == set(torch.cat([first, second]).flatten().tolist())
    layer.set_activation_range(torch.cat(observer.samples), signed=True)
    assert layer.calibrated and layer.activation_signed is True


def test_an_observer_samples_large_inputs_and_stays_small() -> None:
    layer = activation_layer()
    layer.begin_observing()
    for _ in range(20):
        layer(torch.rand(4000, 4))
    layer(torch.full((1, 4), -3.0))
    observer = layer.end_observing()
    assert torch.cat(observer.samples).numel() <= 20_000
    # The sign is never missed, however late the negative values come.
    assert observer.low.item() == -3


def test_weights_at_full_precision_are_used_as_they_are() -> None:
    layer = compress(nn.Linear(8, 4), dict(weight={}, activation=dict(bits=4))).eval()
    assert not layer.changes_weight
    assert torch.equal(layer.compressed_weight(), layer.weight)
    assert 'slope_step' not in layer.state_dict()


def test_layers_of_other_bits_have_no_input_quantizer() -> None:
    layer = compress(nn.Linear(8, 4))
    assert layer.calibrated and layer.activation_signed is None
    assert set(layer.state_dict()) == {'weight', 'bias', 'slope_step', 'slope_layer'}


def test_runs_count_forwards_for_training() -> None:
    layer, x = compress(nn.Linear(8, 4)), torch.randn(2, 8)
    layer(x)
    layer(x)
    assert layer.runs == 2
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert layer.runs == 2


def test_compressed_layers_train(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it: a small net fits a function through masks, codes and quantized inputs."""
    model = Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    compress(model, W4A4)
    x = torch.randn(256, 8)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3], x.sum(1) / 3], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        with shared_weights(slope_mm.compressed_layers(model).values()):
            loss = F.mse_loss(model(x), target) + 0.1 * slope_mm.regularization(model)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    for layer in slope_mm.compressed_layers(model).values():
        assert kept_input_channels(layer, 4) <= {0, 1, 2}
    assert isinstance(model[0], SlopeLinear) and not isinstance(model[0], SlopeConvTranspose2d)
    assert capsys.readouterr().out == ''


def test_an_input_of_zeros_alone_calibrates_nothing() -> None:
    layer = slope_mm.convert(
        nn.Sequential(nn.Linear(8, 4)), dict(weight=dict(bits=4), activation=dict(bits=4))
    )[0]
    layer.train()
    layer(torch.zeros(2, 8))
    assert not layer.calibrated
    layer(torch.rand(2, 8))
    assert layer.calibrated and float(layer.slope_act_step) > 1e-3
