"""Batch norms in steps and codes: the same function, the same codes, the stock model's keys."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock as ResNetBlock
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import slope_mm
from slope_mm import SlopeError
from slope_mm.folding import batch_norm_pairs
from slope_mm.packing import load_packed, save_packed


class Bottleneck(nn.Module):
    """A block whose norms are found by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 12, 1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.downsample(x)).relu()


class PreActivation(nn.Module):
    """The norm comes first: nothing to fold, whatever the names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(x).relu())


def test_a_weight_that_a_hook_computes_is_not_folded_into() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvModule(8, 8, 3, norm_cfg=dict(type='BN'), with_spectral_norm=True),
        nn.Sequential(weight_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)),
        ConvModule(8, 8, 1, norm_cfg=dict(type='BN')),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(slope_mm.fold_batch_norms(model)(x), model(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvModule(3, 8, 3, norm_cfg=dict(type='BN'))
        self.block = Bottleneck()
        self.pre = PreActivation()
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        # One convolution, a norm for each level.
        self.shared = ConvModule(4, 4, 1, norm_cfg=dict(type='BN'))
        self.level = ConvModule(4, 4, 1, norm_cfg=dict(type='BN'))
        self.level.conv = self.shared.conv
        self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.pre(self.block(self.stem(x))))
        return self.head((self.shared(x) + self.level(x)).mean((2, 3)))


FOLDED = ['stem.conv', 'block.conv1', 'block.conv2', 'block.downsample.0', 'up.0', 'head.0']


@pytest.fixture
def net() -> nn.Module:
    """With norms of both signs, one of them zero."""
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
            module.weight.data[0] = 0
    return model


def image() -> Tensor:
    return torch.randn(2, 3, 9, 9)


def test_only_norms_right_behind_a_layer_of_their_own_are_folded(net: nn.Module) -> None:
    assert [layer for layer, _ in batch_norm_pairs(net)] == FOLDED


class BasicBlock(nn.Module):
    """The same names once more, in the order of a block that normalizes first."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(x).relu())


class UsedTwice(nn.Module):
    """A convolution with its norm and without, and two that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(8, 8, 1)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(8))
        self.second = nn.Sequential(conv, nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.fourth = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.fourth[0].weight = self.third[0].weight


class OwnOrder(nn.Sequential):
    """A sequence whose forward is another one."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).relu())


class OwnConvModule(ConvModule):
    """Another forward under inherited names."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1, norm_cfg=dict(type='BN'))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).sigmoid())


class OwnBasicBlock(ResNetBlock):
    """The same of a ResNet's block."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x).tanh())).tanh())


class Patched(nn.Module):
    """A forward that was put on the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.part.forward = lambda x: self.part[1](self.part[0](x).relu())


@pytest.mark.parametrize(
    'kind', [BasicBlock, UsedTwice, OwnOrder, OwnConvModule, OwnBasicBlock, Patched]
)
def test_what_is_seen_elsewhere_or_runs_in_another_order_is_left_alone(
    kind: type[nn.Module],
) -> None:
    assert batch_norm_pairs(kind()) == []


@pytest.mark.parametrize('codes', ['symmetric', 'odd', 'lsq'])
@pytest.mark.parametrize('inplace', [False, True])
def test_folded_models_compute_the_same_with_the_same_codes(
    codes: str, inplace: bool, net: nn.Module, tmp_path: Path
) -> None:
    recipe = dict(weight=dict(sparsity='2:4', bits=4, codes=codes), activation=dict(bits=8))
    model = slope_mm.convert(net, recipe)
    model.train()(image())
    x, before = image(), copy.deepcopy(model.eval().state_dict())
    original = copy.deepcopy(model)
    expected = model(x)
    folded = slope_mm.fold_batch_norms(model, inplace=inplace)
    assert (folded is model) is inplace
    if not inplace:
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    # Quantized inputs may fall on the other side of a boundary.
    assert (folded(x) - expected).abs().max() < 0.02 * expected.abs().max()
    closed = codes != 'lsq'
    for name, norm_name in batch_norm_pairs(original):
        layer, norm = folded.get_submodule(name), folded.get_submodule(norm_name)
        gamma = original.get_submodule(norm_name).weight
        was, now = original.get_submodule(name).codes(), layer.codes()
        signs = torch.where(gamma < 0, -1, 1)
        shape = [1] * now.dim()
        shape[layer.output_axis] = -1
        flipped = (signs if closed else torch.ones_like(signs)).reshape(shape)
        offset = layer.slope_spec.weight_codes.offset
        mask = True if layer.mask is None else layer.mask
        kept = (gamma != 0).reshape(shape).expand_as(now) & mask
        assert torch.equal((now + offset)[kept], ((was + offset) * flipped)[kept]), name
        assert torch.equal(norm.weight, torch.ones_like(gamma) if closed else signs.float())
        assert not norm.running_mean.any() and len(norm.running_var.unique()) == 1
    # And in a file: only the bias is left of each norm.
    length = save_packed(original, tmp_path / 'whole')
    assert save_packed(folded, tmp_path / 'folded') < length
    loaded = load_packed(tmp_path / 'folded', Net().eval())
    assert torch.equal(loaded(x), folded(x))


def test_without_quantized_inputs_the_difference_is_rounding(net: nn.Module) -> None:
    model, x = slope_mm.convert(net, dict(weight=dict(sparsity='2:4', bits=4))).eval(), image()
    expected = model(x)
    folded = slope_mm.fold_batch_norms(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    stock = Net().eval()
    stock.load_state_dict(slope_mm.bake(folded).state_dict(), strict=True)
    assert torch.equal(stock(x), folded(x))


def test_weights_at_full_precision_are_folded_too(net: nn.Module) -> None:
    model, x = slope_mm.convert(net, dict(weight=dict(sparsity='2:4'))).eval(), image()
    expected = model(x)
    masks = {n: la.mask for n, la in slope_mm.compressed_layers(model).items()}
    folded = slope_mm.fold_batch_norms(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    for name, layer in slope_mm.compressed_layers(folded).items():
        assert layer.mask is None or torch.equal(layer.mask, masks[name])


def test_one_step_for_a_tensor_cannot_take_a_factor_for_each_channel(net: nn.Module) -> None:
    model = slope_mm.convert(net, dict(weight=dict(bits=4, step='tensor')))
    assert batch_norm_pairs(model) == []
    with pytest.raises(SlopeError, match='leave folding out'):
        slope_mm.fold_batch_norms(model)


def test_a_frozen_mask_outlives_folding() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    slope_mm.convert(net, dict(weight=dict(sparsity='2:4', bits=4, codes='symmetric')))
    layer, image = net[0], torch.randn(2, 8, 6, 6)
    layer.hold_mask()
    with torch.no_grad():
        # Another weight than the one that the mask was frozen for.
        layer.weight.copy_(torch.randn_like(layer.weight))
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        before, mask = net(image), layer.mask.clone()
        assert not torch.equal(layer.live_mask(), mask)
        folded = slope_mm.fold_batch_norms(net)
        torch.testing.assert_close(folded(image), before)
    assert torch.equal(folded[0].mask, mask)
