"""Layers as matrix products: the product of both parts is the stock layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope_mm
from slope_mm.oneshot.matrix import from_matrix, unfolded_inputs, weight_matrix

LAYERS = {
    'plain': (nn.Conv2d(8, 6, 3), (2, 8, 7, 6)),
    'strided': (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    'dilated': (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (1, 4, 7, 6)),
    'same': (nn.Conv2d(4, 6, (2, 3), padding='same'), (1, 4, 5, 6)),
    'reflect': (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (2, 4, 5, 6)),
    'grouped': (nn.Conv2d(8, 6, 3, groups=2, padding=1), (2, 8, 5, 6)),
    'depthwise': (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 6)),
    'transposed': (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 3)),
    'overlapping': (
        nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, dilation=(2, 1)),
        (2, 4, 5, 3),
    ),
    'transposed groups': (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 3)),
    'linear': (nn.Linear(8, 5), (2, 3, 8)),
}


# torch's own, for an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize('name', LAYERS)
@torch.no_grad()
def test_the_product_is_the_output(name: str) -> None:
    stock, shape = LAYERS[name]
    x = torch.randn(shape)
    bias = 0 if stock.bias is None else stock.bias
    wanted = stock(x)
    model = slope_mm.convert(nn.Sequential(stock), dict(weight=dict(sparsity=None, bits=8)))
    try:
        layer = model[0]
        matrix = weight_matrix(layer, layer.weight)
        rows = torch.cat(list(unfolded_inputs(layer, x, 10**9)), 1)
        product = torch.einsum('grc,gpc->gpr', matrix, rows)
        if wanted.dim() == 4:
            # [groups, images * positions, rows] to images, channels, positions.
            batch, channels, height, width = wanted.shape
            groups = len(matrix)
            product = product.reshape(groups, batch, height * width, channels // groups)
            product = product.permute(1, 0, 3, 2).reshape(wanted.shape)
            bias = torch.as_tensor(bias).view(-1, 1, 1)
        else:
            product = product.reshape(wanted.shape)
        assert torch.allclose(product + bias, wanted, atol=1e-5)
        assert torch.equal(from_matrix(layer, matrix), layer.weight)
        # Consecutive columns are consecutive input channels at one kernel position.
        count, axis = layer.weight.shape[layer.input_axis], layer.input_axis
        channels = torch.arange(count)
        shape = [count if i == axis else 1 for i in range(layer.weight.dim())]
        numbered = weight_matrix(layer, channels.view(shape).expand_as(layer.weight))
        inputs = count // len(matrix) if axis == 0 else count
        columns = numbered[0, 0].reshape(-1, inputs)
        assert torch.all(columns == columns[:1]) and torch.all(columns[0].diff() == 1)
    finally:
        slope_mm.bake(model, inplace=True)


@torch.no_grad()
def test_a_limit_thins_positions_out() -> None:
    model = slope_mm.convert(
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)), dict(weight=dict(bits=8))
    )
    x = torch.arange(2 * 4 * 10 * 10.0).view(2, 4, 10, 10)
    rows = torch.cat(list(unfolded_inputs(model[0], x, 50)), 1)[0]
    assert 25 <= len(rows) <= 100
    everything = {tuple(row) for row in x.permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
    assert {tuple(row) for row in rows.tolist()} <= everything
