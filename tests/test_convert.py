"""Plan and convert: what is converted and why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from convertible_net import W4, W4A4, Net
from mmcv.cnn.bricks import ConvModule
from mmdet.models.layers import SinePositionalEncoding
from torch import nn

import slope_mm
from slope_mm import PackedFileError, RecipeError, SlopeError
from slope_mm.layers import LAYER_KINDS, CompressedLayer


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_plan_says_what_each_layer_gets_and_why_not_more() -> None:
    model = Net()
    before = {name: type(module) for name, module in model.named_modules()}
    plans = {p.name: p for p in slope_mm.plan(model, W4A4)}
    told = {name: (str(p.spec) if p.spec else None, p.reason) for name, p in plans.items()}
    assert told == {
        'stem': ('dense W8 A8', 'stem'),
        'conv': ('2:4 W4 A4', ''),
        'grouped': ('2:4 W4 A4', ''),
        'up': ('2:4 W4 A4', ''),
        'narrow': ('dense W4 A4', '6 input channels hold no 2:4: no sparsity'),
        'attention.in_proj': ('2:4 W4 A4', ''),
        'attention.out_proj': ('2:4 W4 A4', ''),
        'fc': ('2:4 W4 A4', ''),
        'fc_cls': ('dense W8 A8', 'prediction layer'),
    }
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert plans.pop('attention.in_proj').module is model.attention
    assert all(p.module is model.get_submodule(name) for name, p in plans.items())


def test_convert_does_what_the_plan_says() -> None:
    model = Net()
    plans = slope_mm.plan(model, W4A4)
    weights = dict(model.named_parameters())
    assert slope_mm.convert(model, W4A4) is model
    layers = slope_mm.compressed_layers(model)
    assert layers.keys() == {p.name for p in plans if p.spec}
    for planned in plans:
        if planned.spec is None:
            assert not isinstance(planned.module, CompressedLayer)
            continue
        layer = layers[planned.name]
        assert layer.slope_spec == planned.spec
        if planned.name == 'attention.in_proj':
            assert layer is planned.module.in_proj
            assert layer.weight is weights['attention.in_proj_weight']
        else:
            assert layer is planned.module
            assert layer.weight is weights[f'{planned.name}.weight']


def test_a_recipe_object_serves_as_well() -> None:
    model = slope_mm.convert(Net(), slope_mm.Recipe.parse(W4A4))
    assert len(slope_mm.compressed_layers(model)) == 9


def test_a_layer_may_be_the_model() -> None:
    layer = nn.Linear(8, 8)
    assert slope_mm.convert(layer, W4) is layer
    assert slope_mm.compressed_layers(layer) == {'': layer}
    assert type(slope_mm.bake(layer)) is nn.Linear


@pytest.mark.parametrize('kind', LAYER_KINDS)
def test_subclasses_of_known_kinds_are_left_alone(kind: type[nn.Module]) -> None:
    """They may do anything in their forward; dispatch is by exact type."""
    other = type('Other', (kind,), {})
    arguments = (8, 8) if issubclass(kind, nn.Linear) else (8, 8, 3)
    model = nn.Sequential(other(*arguments), kind(*arguments))
    plans = slope_mm.plan(model, W4)
    assert [p.spec is None for p in plans] == [True, False]
    assert plans[0].reason == 'no compressed kind of Other'


def test_unknown_layers_are_listed_and_never_touched() -> None:
    model = nn.ModuleList(
        [
            nn.Bilinear(4, 4, 4),
            nn.Embedding(5, 4),
            nn.GRU(4, 4),
            nn.LayerNorm([4, 1, 1]),
            nn.Linear(4, 4),
        ]
    )
    model.append(SinePositionalEncoding(4))
    plans = {p.name: p.reason for p in slope_mm.plan(model, W4)}
    assert plans == {
        '0': 'no compressed kind of Bilinear',
        '1': 'a table that is looked up or added, not multiplied',
        '2': 'no compressed kind of GRU',
        '4': '',
    }


def test_a_weight_that_a_hook_computes_is_left_alone() -> None:
    """mmcv's ConvModule can put spectral norm on its convolution."""
    model = nn.Sequential(ConvModule(8, 8, 3, with_spectral_norm=True), nn.Conv2d(8, 8, 1))
    plans = {p.name: (p.spec is None, p.reason) for p in slope_mm.plan(model, W4)}
    assert plans == {'0.conv': (True, 'its weight is computed by a hook'), '1': (False, '')}
    told = {row.name: (row.shape, row.note) for row in slope_mm.report(model, W4)}
    assert told['0.conv'] == ((8, 8, 3, 3), 'its weight is computed by a hook')
    slope_mm.convert(model, W4)(torch.randn(1, 8, 5, 5)).sum().backward()
    assert {row.name: row.pattern for row in slope_mm.report(model)} == {'0.conv': '', '1': '2:4'}


@pytest.mark.parametrize('layer', [nn.LazyConv2d, nn.LazyLinear])
def test_a_layer_without_a_shape_is_named(layer: Callable[..., nn.Module]) -> None:
    lazy = layer(8, 3) if layer is nn.LazyConv2d else layer(8)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), lazy)
    for refused in (slope_mm.plan, slope_mm.convert, slope_mm.report):
        with pytest.raises(SlopeError, match=f"{layer.__name__} '1' has no shape yet"):
            refused(model, W4)
    assert type(model[0]) is nn.Conv2d


def test_what_is_compressed_already_is_refused() -> None:
    model = slope_mm.convert(Net(), W4)
    spec = model.conv.slope_spec
    with pytest.raises(SlopeError, match=r"compressed already \(layer 'stem'\).*bake"):
        slope_mm.convert(model, W4A4)
    assert model.conv.slope_spec is spec


def test_a_converted_part_makes_the_whole_refused() -> None:
    model = Net()
    slope_mm.convert(model.up, W4)
    with pytest.raises(SlopeError, match="layer 'up'"):
        slope_mm.convert(model, W4)
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize('model', [nn.ReLU(), nn.BatchNorm2d(4), nn.Sequential()])
def test_a_model_without_weights_is_refused(model: nn.Module) -> None:
    with pytest.raises(RecipeError, match='compresses no layer of this model: it has no weights'):
        slope_mm.convert(model, W4)


def test_a_parameter_of_two_layers_is_told_before_training() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    recipe = dict(weight=dict(bits=4), rules=[dict(match='re:.*')])
    with pytest.warns(UserWarning, match=r"'0.weight' and '2.weight' are one parameter.*untie"):
        slope_mm.convert(model, recipe)
    with pytest.raises(PackedFileError, match='are one parameter'):
        slope_mm.save_packed(model, '/nowhere/model.slope')


def test_a_layer_under_two_names_is_no_such_case() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        slope_mm.convert(model, dict(weight=dict(bits=4), rules=[dict(match='re:.*')]))
