"""Latent weights lead to exactly the masks and codes that were found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slope_mm
from slope_mm.oneshot.compress import compensate_layer
from slope_mm.oneshot.latent import latent_weight
from slope_mm.oneshot.moments import SecondMoments
from slope_mm.oneshot.rounding import compensate
from slope_mm.ops import weight_codes

SPECS = [
    dict(sparsity='2:4', bits=2),
    dict(sparsity='2:4', bits=4),
    dict(sparsity='2:8', bits=3, codes='odd'),
    dict(sparsity='2:8', bits=2, codes='symmetric', step='tensor'),
    dict(sparsity=None, bits=3),
    dict(sparsity='unstructured:0.4', bits=3),
    dict(sparsity='2:4', bits=None),
]


def compensated(
    weight: dict[str, object], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    stock = nn.Conv2d(16, 12, 3, bias=False)
    x = torch.randn(4, 16, 9, 9) @ torch.randn(9, 9)
    dense = stock.weight.detach().clone()
    layer = slope_mm.convert(nn.Sequential(stock), dict(weight=weight))[0].to(dtype)
    moments = SecondMoments(layer)
    moments.add(x)
    compensate_layer(layer, moments)
    return layer, dense


@pytest.mark.parametrize('weight', SPECS, ids=str)
@torch.no_grad()
def test_the_compressed_weight_compresses_to_itself(weight: dict[str, object]) -> None:
    layer, dense = compensated(weight)
    found = layer.compressed_weight().clone()
    assert not torch.equal(layer.weight, found)
    mask = layer.mask
    # Sparsify, then quantize what is compressed already: nothing may move.
    layer.weight.copy_(found)
    assert torch.equal(layer.compressed_weight(), found)
    if mask is not None:
        assert torch.all(found[~mask] == 0)
        assert not torch.all(found[mask] == 0)
    assert not torch.equal(found, dense)


@pytest.mark.parametrize('name', ['lsq', 'symmetric', 'odd'])
@pytest.mark.parametrize('bits', [2, 4])
@torch.no_grad()
def test_codes_and_mask_are_those_of_the_rounding(name: str, bits: int) -> None:
    """The layer finds by itself, from W alone, what the rounding had decided."""
    torch.manual_seed(bits)
    stock = nn.Linear(32, 24, bias=False)
    # Small weights: at 2 bits many kept ones have code 0, as their pruned neighbours.
    stock.weight.copy_(torch.randn(24, 32) ** 3)
    inputs = torch.randn(200, 32) @ torch.randn(32, 32)
    layer = slope_mm.convert(
        nn.Sequential(stock), dict(weight=dict(sparsity='2:8', bits=bits, codes=name))
    )[0]
    codes = weight_codes(name, bits)
    found = compensate(
        layer.weight.detach(), [inputs.T @ inputs], pattern=layer.slope_spec.pattern, codes=codes
    )
    moments = SecondMoments(layer)
    moments.moments = [[inputs.T @ inputs]]
    compensate_layer(layer, moments)
    assert found.step is not None
    levels = (found.compressed / found.step - codes.offset).round() * found.mask
    assert torch.equal(layer.mask, found.mask)
    assert torch.equal(layer.codes().double(), levels)
    assert torch.allclose(layer.compressed_weight().double(), found.compressed, rtol=1e-5)
    if name != 'odd' and bits == 2:
        assert bool((found.compressed[found.mask] == 0).any())


def test_pruned_latents_stay_below_every_kept_one_of_their_group() -> None:
    torch.manual_seed(0)
    corrected = torch.randn(6, 16).double()
    mask = torch.zeros(6, 16, dtype=torch.bool).view(6, 4, 4)
    mask[..., 2:] = True
    mask = mask.view(6, 16)
    codes, step = weight_codes('lsq', 3), torch.full((6, 1), 0.8).double()
    rounded = (corrected / step).round().clamp(-4, 3) * step * mask
    latent = latent_weight(corrected, rounded, mask, step, codes, 4).view(6, 4, 4)
    assert torch.all(latent[..., :2].abs().amax(-1) < latent[..., 2:].abs().amin(-1))
    assert torch.all(latent != 0)


@torch.no_grad()
def test_half_precision_holds_mask_and_codes() -> None:
    layer, _ = compensated(dict(sparsity='2:4', bits=4), torch.bfloat16)
    full, _ = compensated(dict(sparsity='2:4', bits=4))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.mask.view(12, 4, 4, 3, 3).sum(2).eq(2).all()
    assert full.codes().shape == layer.codes().shape
