"""Weight-standardized convolutions: compressed after standardization, plain after baking."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import W4, W4A4, compress
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from torch import Tensor, nn

import slope_mm
from slope_mm import SlopeError
from slope_mm.engine.stock import save_stock
from slope_mm.ops import nm_mask
from slope_mm.packing import PackedFile, load_packed, packed_state_dict, read_packed

KINDS = [ConvWS2d, ConvAWS2d]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def standardized_slowly(conv: Any) -> Tensor:
    """Filter by filter, with numbers."""
    filters = []
    for index, weight in enumerate(conv.weight.detach()):
        values = weight - weight.mean()
        variance = float(weight.var())
        if isinstance(conv, ConvWS2d):
            filters.append(values / (variance**0.5 + conv.eps))
        else:
            gamma, beta = conv.weight_gamma[index], conv.weight_beta[index]
            filters.append(values / (variance + 1e-5) ** 0.5 * gamma + beta)
    return torch.stack(filters)


def net(kind: type[Any]) -> nn.Module:
    model = nn.Sequential(kind(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1))
    if kind is ConvAWS2d:
        nn.init.uniform_(model[0].weight_gamma, 0.5, 2)
        nn.init.normal_(model[0].weight_beta, std=0.1)
    return model


def image() -> Tensor:
    return torch.randn(2, 8, 6, 5)


@pytest.mark.parametrize('kind', KINDS)
def test_the_standardized_weight_is_what_is_compressed(kind: type[Any]) -> None:
    model = net(kind)
    latent = standardized_slowly(model[0])
    layer = compress(model)[0]
    torch.testing.assert_close(layer.latent_weight(), latent)
    found = layer.compressed_weight()
    assert torch.equal(found != 0, nm_mask(latent, 2, 4, 1) & (found != 0))
    assert torch.equal(layer.mask, nm_mask(latent, 2, 4, 1))
    expected = (latent / layer.step).round().clamp(-8, 7) * layer.step * layer.mask
    torch.testing.assert_close(found, expected)
    x = image()
    torch.testing.assert_close(layer(x), F.conv2d(x, found, layer.bias, padding=1))
    row = next(iter(slope_mm.report(model)))
    assert row.cosine == pytest.approx(
        float(F.cosine_similarity(latent.flatten(), found.flatten(), 0))
    )


@pytest.mark.parametrize('kind', KINDS)
def test_the_parameter_learns_through_the_standardization(kind: type[Any]) -> None:
    layer = compress(net(kind))[0]
    layer(image()).square().sum().backward()
    # What does not change the standardized weight has no gradient.
    rows = layer.weight.grad.flatten(1)
    assert (rows.sum(1).abs() < 1e-4 * rows.abs().sum(1)).all()
    assert rows.any() and layer.slope_step.grad.any()


@pytest.mark.parametrize('recipe', [W4, W4A4])
@pytest.mark.parametrize('kind', KINDS)
def test_a_baked_layer_is_a_plain_convolution(kind: type[Any], recipe: dict[str, Any]) -> None:
    model, x = compress(net(kind), recipe), image()
    model(x)
    model.eval()
    kept = 'fake_quant' if recipe is W4A4 else 'drop'
    with pytest.warns(
        UserWarning, match=r"1 weight-standardized convolutions \('0', .* plain ones"
    ):
        baked = slope_mm.bake(model, activations=kept)
    assert type(baked[0]) is nn.Conv2d
    torch.testing.assert_close(baked(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r'0\.slope_standardized'):
        net(kind).load_state_dict(baked.state_dict(), strict=True)
    # A compressed model takes it for what it is.
    again = compress(net(kind), recipe).eval()
    again.load_state_dict(baked.state_dict(), strict=False)
    assert torch.equal(again[0].latent_weight(), baked[0].weight)
    again.load_state_dict(net(kind).state_dict(), strict=True)
    assert again[0].slope_standardized is None


@pytest.mark.parametrize('kind', KINDS)
def test_a_stock_checkpoint_is_refused(kind: type[Any], tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match=rf"layer '0' .*packed.*type:{kind.__name__}"):
        save_stock(compress(net(kind)), tmp_path / 'stock.pth')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('recipe', [W4, W4A4])
@pytest.mark.parametrize('kind', KINDS)
def test_a_packed_file_says_that_it_is_standardized(
    kind: type[Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    model, x, file = compress(net(kind), recipe), image(), tmp_path / 'model.slope'
    model(x)
    expected = model.eval()(x)
    slope_mm.save_packed(model, file)
    packed = read_packed(file)
    assert packed.header['version'] == 2 and packed.header['layers']['0']['standardized']
    assert torch.equal(torch.from_numpy(packed['0.weight']), model[0].compressed_weight())
    by_state = compress(net(kind), recipe).eval()
    by_state.load_state_dict(packed_state_dict(PackedFile.open(file)), strict=True)
    for loaded in (load_packed(file, net(kind).eval()), by_state):
        assert torch.equal(loaded(x), expected)
        # It goes on as a plain convolution, also through a checkpoint.
        again = compress(net(kind), recipe).eval()
        again.load_state_dict(copy.deepcopy(loaded.state_dict()), strict=True)
        assert torch.equal(again(x), expected)
    if kind is ConvAWS2d:
        assert torch.equal(loaded[0].weight_gamma, model[0].weight_gamma)
    with pytest.raises(slope_mm.PackedFileError, match="layer '0' was packed|no '0.weight_beta'"):
        load_packed(file, nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)))
