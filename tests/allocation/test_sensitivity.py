"""Errors of outputs and weights, one layer at a time, against doing it by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from nets import RECIPE, images, net
from torch import Tensor, nn

import slope_mm
from slope_mm import ops
from slope_mm.allocation.choices import with_weight
from slope_mm.allocation.sensitivity import sensitivities

CHOICES: list[tuple[str | None, int]] = [(None, 2), ('2:4', 3), ('2:4', 8)]
NAMES = ['wide', 'fc']
RECIPE_2_4 = slope_mm.Recipe.parse(dict(weight=dict(sparsity='2:4', bits=4)))


def baked(choice: tuple[str | None, int]) -> Any:
    return slope_mm.bake(slope_mm.convert(net(), with_weight(RECIPE, choice)))


def output_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What one layer of a model gives."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_output_errors_are_those_of_one_compressed_layer_in_a_dense_net() -> None:
    model, x = net(), images()
    before = copy.deepcopy(model.state_dict())
    errors = sensitivities(model, RECIPE, CHOICES, NAMES, lambda dense: dense(x))
    for choice in CHOICES:
        for name in NAMES:
            single = net()
            single.get_submodule(name).weight.copy_(baked(choice).get_submodule(name).weight)
            outputs = [output_of(one, name, x) for one in (net(), single)]
            wanted = (outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()
            assert errors[name][choice] == pytest.approx(float(wanted), rel=1e-4)
    assert errors['wide'][None, 2] > errors['wide']['2:4', 8]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_weight_errors_are_sqnr() -> None:
    errors = sensitivities(net(), RECIPE, CHOICES, NAMES)
    for choice in CHOICES:
        for name in NAMES:
            weights = [m.get_submodule(name).weight for m in (net(), baked(choice))]
            decibels = float(ops.sqnr_db(*weights))
            assert errors[name][choice] == pytest.approx(10 ** (-decibels / 10), rel=1e-4)


def test_a_standardized_weight_is_judged_after_standardization() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvWS2d(16, 16, 3, bias=False))
    # Standardization undoes this.
    model[0].weight.data.mul_(0.01)
    found = sensitivities(model, RECIPE_2_4, [('2:4', 4)], ['0'])['0']['2:4', 4]
    rows = model[0].weight.detach().flatten(1).double()
    standard = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    baked = slope_mm.bake(slope_mm.convert(model, RECIPE_2_4))[0].weight.double().flatten(1)
    wanted = (standard - baked).square().sum() / standard.square().sum()
    assert found == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize('by_output', [False, True])
def test_a_layer_of_zeros_has_a_finite_error(by_output: bool) -> None:
    # The last layer of a residual branch begins so; levels without a zero make something of it.
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, bias=False))
    nn.init.zeros_(model[1].weight)
    recipe = slope_mm.Recipe.parse(dict(weight=dict(sparsity='2:4', bits=2, codes='odd')))
    x = torch.randn(2, 16, 4, 4)
    forward = (lambda dense: dense(x)) if by_output else None
    errors = sensitivities(model, recipe, CHOICES, ['0', '1'], forward)
    assert set(errors['1'].values()) == {1.0}
    assert all(0 < error < 1 for error in errors['0'].values())


def test_a_layer_that_images_never_reach_counts_by_its_weight() -> None:
    model = net()
    model.spare = torch.nn.Linear(16, 8)
    x = images()
    by_output = sensitivities(model, RECIPE, CHOICES, ['spare'], lambda dense: dense(x))
    assert by_output == sensitivities(model, RECIPE, CHOICES, ['spare'])
