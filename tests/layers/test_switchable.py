"""DetectoRS' switchable atrous convolution: two standardized weights of one layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import W4, W4A4, compress
from mmcv.ops.saconv import SAConv2d
from torch import Tensor, nn

import slope_mm
from slope_mm import SlopeError
from slope_mm.analysis.bops import count_operations
from slope_mm.engine.stock import save_stock
from slope_mm.ops import nm_mask
from slope_mm.packing import load_packed, read_packed

either = pytest.mark.parametrize('deformable', [False, True])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def net(deformable: bool) -> nn.Module:
    layer = SAConv2d(8, 12, 3, stride=2, padding=1, bias=False, use_deform=deformable)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.uniform_(layer.weight_gamma, 0.5, 2)
    nn.init.normal_(layer.weight_beta, std=0.1)
    return nn.Sequential(layer)


def image() -> Tensor:
    return torch.randn(2, 8, 9, 8)


def with_weights(stock: nn.Module, small: Tensor, large: Tensor) -> nn.Module:
    """mmcv's own forward with other weights in the two places where it makes them."""
    layer: Any = stock[0]  # type: ignore[index]
    layer._get_weight = lambda weight: small
    layer.weight_diff = nn.Parameter(large - small)
    return stock


ALONE = [dict(match=f'0.{x}', compress=False) for x in ('switch', 'pre_context', 'post_context')]


@either
def test_both_weights_are_compressed_after_standardization(deformable: bool) -> None:
    stock, x = net(deformable), image()
    model = compress(copy.deepcopy(stock), dict(**W4, rules=ALONE))
    layers = slope_mm.compressed_layers(model)
    assert set(layers) == {'0.small', '0.large'}
    standardized = stock[0]._get_weight(stock[0].weight).detach()
    latents = {'0.small': standardized, '0.large': standardized + stock[0].weight_diff.detach()}
    for name, layer in layers.items():
        assert torch.equal(layer.latent_weight(), latents[name])
        assert torch.equal(layer.mask, nm_mask(latents[name], 2, 4, 1))
    small, large = (layers[f'0.{x}'].compressed_weight().detach() for x in ('small', 'large'))
    expected = with_weights(stock, small, large)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    # In evaluation a weight is used again until what it is made of changes.
    model.eval()
    with torch.no_grad():
        model(x)
        model[0].weight.add_(torch.randn_like(model[0].weight))
        changed = model(x)
        small, large = (layers[f'0.{name}'].compressed_weight() for name in ('small', 'large'))
        torch.testing.assert_close(changed, with_weights(stock, small, large)(x))


@either
@pytest.mark.parametrize('recipe', [W4, W4A4])
def test_from_training_to_files(deformable: bool, recipe: dict[str, Any], tmp_path: Path) -> None:
    model, x, file = compress(net(deformable), recipe), image(), tmp_path / 'model.slope'
    model(x).square().sum().backward()
    frozen = {'offset_s', 'offset_l'}
    assert all(p.grad is not None for p in model.parameters())
    assert not any(set(name.split('.')) & frozen for name in slope_mm.compressed_layers(model))
    expected = model.eval()(x)
    kept = 'fake_quant' if recipe is W4A4 else 'drop'
    with pytest.warns(UserWarning, match='2 weight-standardized'):
        baked = slope_mm.bake(model, activations=kept)
    torch.testing.assert_close(baked(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r'0\.slope_standardized'):
        net(deformable).load_state_dict(baked.state_dict(), strict=True)
    with pytest.raises(SlopeError, match='type:SAConv2d'):
        save_stock(model, tmp_path / 'stock.pth')
    slope_mm.save_packed(model, file)
    packed = read_packed(file)
    for name, key in (('small', 'weight'), ('large', 'weight_diff')):
        assert packed.header['layers'][f'0.{name}']['standardized']
        weight = slope_mm.compressed_layers(model)[f'0.{name}'].compressed_weight()
        assert torch.equal(torch.from_numpy(packed[f'0.{key}']), weight)
    loaded = load_packed(file, net(deformable).eval())
    assert torch.equal(loaded(x), expected)
    again = compress(net(deformable), recipe).eval()
    again.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(again(x), expected)
    stock = net(deformable)
    again.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(
        again[0].large.latent_weight(), stock[0]._get_weight(stock[0].weight) + stock[0].weight_diff
    )


def test_without_its_two_weights_it_stays_stock(tmp_path: Path) -> None:
    rules = [dict(match=f'0.{name}', compress=False) for name in ('small', 'large')]
    model = compress(net(False), dict(**W4, rules=rules))
    assert type(model[0]) is SAConv2d
    assert save_stock(model, tmp_path / 'stock.pth') > 0


def test_products_are_counted_for_each_weight() -> None:
    model, x = net(False).eval(), image()
    rest = 2 * (8 * 8 + 5 * 4 * 8 + 12 * 12)
    for each in (model, compress(copy.deepcopy(model))):
        counted = count_operations(each, lambda each=each: each(x))
        assert counted.macs == 2 * (2 * 12 * 5 * 4) * 8 * 9 + rest
