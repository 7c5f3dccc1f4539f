"""A whole model, compressed without training."""

from __future__ import annotations

import copy

import pytest
import torch
from convertible_net import Net, Tied, image
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.bops import count_operations
from slope_mm.analysis.output_error import output_errors
from slope_mm.oneshot.compress import compensate_model, execution_order

W3A8 = dict(
    weight=dict(sparsity='2:4', bits=3),
    activation=dict(bits=8),
    rules=[dict(match='fc_cls', weight=None)],
)


class Plain(nn.Module):
    """Convolutions whose inputs are correlated, as those of real images."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(16, 16)
        self.conv = nn.Conv2d(8, 16, 3)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.up(self.conv(x).relu()).relu().mean((2, 3)))


def images(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.randn(16, 3, 4, 4, generator=draw), (12, 12))
    mix = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(16, 8, 12, 12, generator=draw)
    return torch.einsum('oc,nchw->nohw', mix, smooth) + 0.1 * noise


@pytest.mark.parametrize('memory', [2**30, 1])
@torch.no_grad()
def test_every_layer_gets_closer_to_its_dense_twin(memory: int) -> None:
    torch.manual_seed(0)
    dense = Plain().eval()
    model = slope_mm.convert(copy.deepcopy(dense), dict(weight=dict(sparsity='2:4', bits=3)))
    # Images that the compensation never saw.
    before = output_errors(dense, model, lambda: dense(images(1)))
    reasons = compensate_model(model, lambda: model(images(0)), memory=memory)
    after = output_errors(dense, model, lambda: dense(images(1)))
    assert reasons == {'late': '', 'conv': '', 'up': '', 'unused': 'the images do not reach it'}
    assert before.keys() == {'late', 'conv', 'up'}
    for name in before:
        assert after[name].relative < 0.8 * before[name].relative, name


def test_layers_are_taken_in_the_order_in_which_they_run() -> None:
    model = slope_mm.convert(Plain(), dict(weight=dict(bits=4)))
    assert list(execution_order(model, lambda: model(images(0)))) == ['conv', 'up', 'late']
    layers = slope_mm.compressed_layers(model).values()
    assert not any(layer._forward_pre_hooks for layer in layers)


@torch.no_grad()
def test_a_state_dict_brings_codes_and_masks_into_another_model() -> None:
    torch.manual_seed(0)
    model = slope_mm.convert(Net(), W3A8)
    model(image())
    model.eval()
    reasons = compensate_model(model, lambda: model(image()))
    assert reasons['conv'] == reasons['up'] == reasons['narrow'] == ''
    assert reasons['fc_cls'] == 'its weight stays as it is'
    other = slope_mm.convert(Net(), W3A8)
    other.load_state_dict(model.state_dict())
    pairs = zip(
        slope_mm.compressed_layers(model).items(),
        slope_mm.compressed_layers(other).values(),
        strict=True,
    )
    for (name, one), two in pairs:
        assert torch.equal(one.compressed_weight(), two.compressed_weight()), name
        if one.mask is not None:
            assert torch.equal(one.mask, two.mask), name
    x = image()
    assert torch.equal(model(x), other.eval()(x))


def test_tied_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model = slope_mm.convert(Tied(), dict(weight=dict(sparsity='2:4', bits=4))).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = torch.arange(16)
    reasons = compensate_model(model, lambda: model(words))
    assert reasons == dict.fromkeys(('first', 'second', 'out'), 'its weight is tied')
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class ByName(nn.Module):
    """Calls its layers with their input's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.conv(input=x).mean((2, 3)))


@torch.no_grad()
def test_inputs_may_be_given_by_name() -> None:
    torch.manual_seed(0)
    dense, x = ByName().eval(), torch.randn(4, 8, 6, 6)
    recipe = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))
    model = slope_mm.convert(copy.deepcopy(dense), recipe).train()
    model(x)
    model.eval()
    torch.testing.assert_close(slope_mm.bake(model, 'fake_quant')(x), model(x))
    assert count_operations(dense, lambda: dense(x)).macs == 4 * (4 * 4 * 8 * 8 * 9 + 8 * 8)
    assert set(compensate_model(model, lambda: model(x)).values()) == {''}


def test_what_cannot_be_compensated_says_why() -> None:
    recipe = dict(
        weight=dict(sparsity='2:4', bits=4),
        order='q_then_s',
        rules=[dict(match='grouped', weight=dict(sparsity=None, step='tensor'))],
    )
    model = slope_mm.convert(Net(), recipe).eval()
    layers = slope_mm.compressed_layers(model)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    reasons = compensate_model(model, lambda: model(image()))
    assert reasons['conv'] == 'quantized first'
    assert reasons['grouped'] == 'its groups share steps'
    for name, reason in reasons.items():
        kept = torch.equal(before[name], layers[name].weight)
        assert kept == bool(reason), name
