"""Random networks under random recipes, good and spoilt.

``SLOPE_MODELS=2000`` and ``SLOPE_RECIPES=5000`` make that many instead of a few dozen;
``--hypothesis-show-statistics`` says how many were converted and how many refused.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from random_nets import RandomNet, image, nets, recipes_for, spoilt
from recipe_cases import Net
from test_recipe_errors import fingerprint
from torch import Tensor, nn

import slope_mm
from slope_mm import Recipe, RecipeError, SlopeError
from slope_mm.layers import CompressedLayer, stock_type
from slope_mm.ops import NMPattern, UnstructuredPattern
from slope_mm.packing import load_packed, save_packed

MODELS = int(os.environ.get('SLOPE_MODELS', '25'))
RECIPES = int(os.environ.get('SLOPE_RECIPES', '60'))
MANY = dict(deadline=None, suppress_health_check=list(HealthCheck))
Build = Callable[[], tuple[RandomNet, int]]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('random')


def converted(model: nn.Module, recipe: Any) -> bool:
    """Converts; a refusal is a RecipeError and leaves every byte as it was."""
    before = fingerprint(model)
    try:
        assert slope_mm.convert(model, recipe) is model
    except RecipeError:
        assert fingerprint(model) == before
        event('refused')
        return False
    event('converted')
    return True


def train_one_step(model: nn.Module, x: Tensor) -> None:
    """Every layer that ran learns: finite gradients, also of its steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model.train()(x).square().mean() + slope_mm.regularization(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    for name, layer in slope_mm.compressed_layers(model).items():
        if layer.slope_step is not None:
            assert layer.slope_step.grad is not None, name
        if layer.slope_act_step is not None and layer.calibrated:
            assert layer.slope_act_step.grad is not None, name
    optimizer.step()


def check_layer(name: str, layer: CompressedLayer) -> None:
    """The compressed weight holds its pattern and its codes, counted in numpy."""
    weight = layer.compressed_weight().detach()
    pattern, bits = layer.slope_spec.pattern, layer.slope_spec.bits
    if isinstance(pattern, NMPattern):
        rows = np.moveaxis(weight.numpy(), layer.input_axis, -1).reshape(-1, pattern.m)
        assert int((rows != 0).sum(-1).max()) <= pattern.n, name
        kept = np.moveaxis(layer.mask.numpy(), layer.input_axis, -1).reshape(-1, pattern.m)
        assert (kept.sum(-1) == pattern.n).all(), name
    elif isinstance(pattern, UnstructuredPattern):
        # At least one weight is kept.
        assert int((weight != 0).sum()) <= max(1, round(pattern.share * weight.numel())), name
    if bits is not None:
        per_step = (weight / layer.step.detach().abs()).numpy()
        levels = {round(float(level), 3) for level in per_step.ravel()} - {0.0, -0.0}
        # The mask's zero may come beside the codes (odd codes have none).
        assert len(levels) <= 2**bits, name


@settings(max_examples=MODELS, **MANY)
@given(nets(), st.data())
def test_a_random_model_under_a_random_recipe(folder: Path, build: Build, data: Any) -> None:
    """Converts, trains, comes back from a checkpoint and a packed file, and is baked."""
    model, inputs = build()
    recipe = data.draw(recipes_for(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {name: type(module) for name, module in modules.items()}
    if not converted(model, recipe):
        return
    now = dict(model.named_modules(remove_duplicate=False))
    assert all(now[name] is module for name, module in modules.items()), 'a module was replaced'
    assert {name: stock_type(module) for name, module in modules.items()} == kinds
    x = image(inputs)
    train_one_step(model, x)
    for name, layer in slope_mm.compressed_layers(model).items():
        check_layer(name, layer)
    wanted = model.eval()(x)

    # A checkpoint.
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = slope_mm.convert(build()[0], recipe).eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), wanted)

    if any(not layer.calibrated for layer in slope_mm.compressed_layers(model).values()):
        # An input of zeros alone (after a ReLU, say) says nothing about its range.
        event('without a range')
        with pytest.raises(SlopeError, match='input quantizers have no range yet'):
            slope_mm.bake(model, activations='fake_quant')
        return

    # Plain layers: the stock model takes their state, strict.
    baked = slope_mm.bake(model, activations='fake_quant')
    assert not slope_mm.compressed_layers(baked)
    torch.testing.assert_close(baked(x), wanted)
    stock = build()[0].eval()
    stock.load_state_dict(slope_mm.bake(model).state_dict(), strict=True)

    # A packed file.
    path = folder / 'model.slope'
    save_packed(model, path)
    again = load_packed(path, build()[0]).eval()
    torch.testing.assert_close(again(x), wanted)


@settings(max_examples=RECIPES, **MANY)
@given(recipes_for(Net()))
def test_a_valid_recipe_round_trips(folder: Path, recipe: dict[str, Any]) -> None:
    """Through its dict, a JSON file and a config file, to the same plan."""
    model = Net()
    try:
        planned = [(p.name, p.spec, p.reason) for p in slope_mm.plan(model, recipe)]
    except RecipeError:
        event('refused')
        return
    event('converted')
    parsed = Recipe.parse(recipe)
    (folder / 'recipe.json').write_text(json.dumps(parsed.to_dict()))
    Config(dict(recipe=recipe)).dump(folder / 'recipe.py')
    for given_recipe in (
        parsed.to_dict(),
        json.loads((folder / 'recipe.json').read_text()),
        Config.fromfile(folder / 'recipe.py').recipe,
    ):
        assert Recipe.parse(given_recipe) == parsed
        again = slope_mm.plan(model, given_recipe)
        assert [(p.name, p.spec, p.reason) for p in again] == planned
    slope_mm.convert(model, recipe)
    weights = sum(
        model.get_submodule(name).compressed_weight().square().sum()
        for name in slope_mm.compressed_layers(model)
    )
    (weights + slope_mm.regularization(model)).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@settings(max_examples=RECIPES, **MANY)
@given(spoilt(recipes_for(Net())))
def test_a_spoilt_recipe_is_valid_or_a_recipe_error(recipe: Any) -> None:
    """Never another error, never half a conversion."""
    converted(Net(), recipe)
