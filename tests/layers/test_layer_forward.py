"""The forward of compressed layers: values, gradients, axes and training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    DENSE_W4,
    KINDS,
    W4,
    W4A4,
    Recipe,
    any_kind,
    compress,
    input_for,
    stock_layer,
)
from mmcv.cnn.bricks import ConvModule
from mmengine.model import Sequential
from torch import nn

import slope_mm
from slope_mm import SlopeError, TensorError
from slope_mm.layers import CompressedLayer, SlopeConvTranspose2d, SlopeLinear, shared_weights
from slope_mm.ops import nm_mask, weight_codes


def kept_input_channels(layer: CompressedLayer, m: int) -> set[int]:
    """How many weights each aligned group of input channels keeps."""
    kept = (layer.compressed_weight() != 0).movedim(layer.input_axis, -1)
    return {int(count) for count in kept.unflatten(-1, (-1, m)).sum(-1).flatten()}


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


def test_a_parametrization_of_a_compressed_convolution_is_refused_by_its_name() -> None:
    layer = slope_mm.convert(nn.Sequential(nn.Conv2d(8, 8, 1)), W4)
    nn.utils.parametrizations.weight_norm(layer[0])
    with pytest.raises(SlopeError, match='parametrization.*before the model is converted'):
        layer(torch.randn(1, 8, 3, 3))


def test_efficient_conv_bn_eval_is_refused() -> None:
    """It scales the latent weight before the layer could compress it."""
    module = ConvModule(8, 8, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True)
    model = compress(nn.Sequential(module))
    model(torch.randn(1, 8, 5, 5))
    with pytest.raises(SlopeError, match='remove efficient_conv_bn_eval'):
        model.eval()(torch.randn(1, 8, 5, 5))


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
