"""mmcv's and mmdet's layers whose forward is their own: deformable, three dilations, TOOD's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layer_cases import W4, W4A4, compress
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.dense_heads import TOODHead
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.bops import count_operations
from slope_mm.layers import CompressedLayer
from slope_mm.layers.composite import Composite


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def levels(x: Tensor) -> int:
    return len(x.unique())


# --- deformable ----------------------------------------------------------------------------------


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('modulated', [False, True])
def test_a_deformable_convolution_samples_with_the_compressed_weight(
    modulated: bool, groups: int
) -> None:
    kind = ModulatedDeformConv2d if modulated else DeformConv2d
    stock, x = kind(8, 6, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 6)
    rest = [torch.randn(2, 18, 5, 6)] + ([torch.rand(2, 9, 5, 6)] if modulated else [])
    model = compress(copy.deepcopy(stock))
    assert int((model.compressed_weight() != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2
    stock.load_state_dict(slope_mm.bake(model).state_dict(), strict=True)
    assert torch.equal(model(x, *rest), stock(x, *rest))
    for module in (model, stock):
        module(x, *rest).square().sum().backward()
    weight = model.weight / model.step
    clipped = model.mask & ((weight < -8) | (weight > 7))
    assert torch.equal(model.weight.grad, stock.weight.grad.masked_fill(clipped, 0))
    assert model.slope_step.grad.any()


@pytest.mark.parametrize('kind', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_offsets_stay_dense_and_see_the_input_as_it_is(kind: type[nn.Module]) -> None:
    stock: Any = kind(8, 6, 3, padding=1)
    nn.init.normal_(stock.conv_offset.weight, std=0.1)
    model, x = compress(copy.deepcopy(stock), W4A4), torch.randn(2, 8, 5, 6)
    plans = {p.name: p.reason for p in slope_mm.plan(stock, W4A4)}
    assert plans == {'': '', 'conv_offset': 'sampling offsets'}
    assert set(slope_mm.compressed_layers(model)) == {''}
    seen: list[Tensor] = []
    hook = model.conv_offset.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = model(x)
    hook.remove()
    assert len(seen) == 1 and torch.equal(seen[0], x)
    assert '_modules' in vars(model) and 'conv_offset' not in vars(model)
    # By the operator itself: offsets of x, samples of the quantized x.
    out = model.conv_offset(x)
    quantized = (x / model.slope_act_step).round().clamp(-8, 7) * model.slope_act_step
    assert levels(quantized) <= 16
    if kind is DeformConv2dPack:
        plain: Any = DeformConv2d(8, 6, 3, padding=1)
        given = (quantized, out)
    else:
        plain = ModulatedDeformConv2d(8, 6, 3, padding=1)
        given = (quantized, out[:, :18], out[:, 18:].sigmoid())
    with torch.no_grad():
        plain.weight.copy_(model.compressed_weight())
        if model._parameters.get('bias') is not None:
            plain.bias.copy_(model.bias)
    torch.testing.assert_close(found, plain(*given), rtol=1e-4, atol=1e-5)
    # And so do the stock layers with hooks.
    baked = slope_mm.bake(model, activations='fake_quant')
    assert type(baked) is kind and list(baked.state_dict()) == list(stock.state_dict())
    for module in (baked, pickle.loads(pickle.dumps(baked))):
        torch.testing.assert_close(module(x), found, rtol=1e-4, atol=1e-5)


def test_a_stock_deformable_checkpoint_loads_without_a_word() -> None:
    stock = DeformConv2dPack(8, 6, 3, padding=1)
    model = compress(DeformConv2dPack(8, 6, 3, padding=1), W4A4)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(model.weight, stock.weight)


# --- three dilations -----------------------------------------------------------------------------


def trident() -> TridentConv:
    layer = TridentConv(8, 6, 3, trident_dilations=(1, 2, 3))
    nn.init.normal_(layer.weight)
    return layer


def test_three_branches_share_one_compressed_weight() -> None:
    stock = trident()
    model, xs = compress(copy.deepcopy(stock)), [torch.randn(2, 8, 9, 9) for _ in range(3)]
    stock.load_state_dict(slope_mm.bake(model).state_dict(), strict=True)
    for training in (True, False):
        model.train(training), stock.train(training)
        inputs = xs if training else xs[:1]
        wanted = stock(inputs)
        assert all(torch.equal(*pair) for pair in zip(model(inputs), wanted, strict=True))
    counted = count_operations(model, lambda: model(xs[:1]))
    assert counted.macs == wanted[0].numel() * 8 * 9


def test_three_branches_share_one_input_step() -> None:
    model, xs = compress(trident(), W4A4), [torch.randn(2, 8, 9, 9) for _ in range(3)]
    found = model(xs)
    sum(y.square().sum() for y in found).backward()
    assert model.slope_act_step.grad.any() and model.weight.grad.any()
    baked = slope_mm.bake(model, activations='fake_quant')
    for pair in zip(baked(xs), found, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


# --- TOOD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=2)])
def test_task_decomposition_scales_the_compressed_weight(norm: dict[str, Any] | None) -> None:
    stock = TaskDecomposition(8, 3, la_down_rate=4, norm_cfg=norm)
    stock.init_weights()
    model, x = compress(nn.Sequential(copy.deepcopy(stock))), torch.randn(2, 24, 5, 6)
    assert '0.reduction_conv.conv' in slope_mm.compressed_layers(model)
    stock.load_state_dict(slope_mm.bake(model)[0].state_dict(), strict=True)
    assert torch.equal(model(x), stock(x))
    assert torch.equal(model[0](x, x.mean((2, 3), keepdim=True)), stock(x, x.mean((2, 3), True)))
    # One whose weights are not compressed at all keeps its class.
    other = compress(nn.Sequential(stock, nn.Conv2d(8, 8, 1)), dict(**W4, rules=[LEFT]))
    assert type(other[0]) is TaskDecomposition


LEFT = dict(match='0', compress=False)


def test_task_decomposition_quantizes_the_features() -> None:
    model = compress(nn.Sequential(TaskDecomposition(8, 3, la_down_rate=4)), W4A4)
    x = torch.randn(2, 24, 5, 6)
    found = model(x)
    found.square().sum().backward()
    conv = model[0].reduction_conv.conv
    assert conv.runs and conv.slope_act_step.grad.any() and conv.weight.grad.any()
    baked = slope_mm.bake(model, activations='fake_quant')
    assert type(baked[0]) is TaskDecomposition
    torch.testing.assert_close(baked(x), found, rtol=1e-4, atol=1e-5)
    macs = count_operations(model, lambda: model(x)).macs
    attention = 2 * (24 * 6 + 6 * 3)
    assert macs == attention + found.numel() * 24


def test_a_tood_head_has_no_latent_weight_in_its_outputs() -> None:
    """The head computes as one into which the compressed weights were loaded, but for its first
    input: deformable convolutions of ones, of its own, are no layers."""
    anchors = dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
        strides=[8, 16],
    )
    head = TOODHead(4, 8, stacked_convs=2, feat_channels=32, anchor_generator=anchors)
    head.init_weights()
    stock, model = copy.deepcopy(head).eval(), compress(head).eval()
    stock.load_state_dict(slope_mm.bake(model).state_dict(), strict=True)
    features = [torch.randn(1, 8, size, size) for size in (8, 4)]
    with torch.no_grad():
        for found, wanted in zip(model(features), stock(features), strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert not any(isinstance(m, (CompressedLayer, Composite)) for m in stock.modules())
