"""lambda * L_reg is added to the loss once per step, with the gradient of the formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from wrapper_cases import (
    ByHand,
    calibrated_toy,
    gradients_at_step,
    l_reg_by_hand,
    regularized,
    toy_batch,
    wrapper_of,
)

import slope_mm
from slope_mm import compressed_layers

MakeConfig = Callable[..., Config]


def task_gradients_by_hand(config: Config, state: dict[str, Tensor], batch: Any) -> dict:
    """A plain torch step of the stock detector after ``slope_mm.convert``, without L_reg."""
    stock = config.model.copy()
    recipe = stock.pop('recipe')
    stock.type = stock.pop('arch')
    init_default_scope('mmdet')
    model = slope_mm.convert(MODELS.build(stock), recipe)
    model.load_state_dict(state)
    model.train()
    torch.manual_seed(7)
    data = model.data_preprocessor(batch, True)
    total = torch.zeros(())
    for name, value in model(**data, mode='loss').items():
        if 'loss' in name:
            total = total + sum(v.mean() for v in (value if isinstance(value, list) else [value]))
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ('kind', 'granularity', 'gradient'),
    [('cosine', 'layer', 'exact'), ('cosine', 'filter', 'ste'), ('l2', 'layer', 'exact')],
)
def test_gradients_equal_a_plain_loop(
    detector: nn.Module,
    detector_config: Config,
    batch: Any,
    kind: str,
    granularity: str,
    gradient: str,
) -> None:
    state, weight = tiny.state_of(detector), 30.0
    task = task_gradients_by_hand(detector_config, state, batch)
    value, extra = l_reg_by_hand(detector, kind, granularity, gradient)

    wrapper = regularized(
        detector, type=kind, weight=weight, granularity=granularity, gradient=gradient
    )
    found = gradients_at_step(wrapper, detector)
    torch.manual_seed(7)
    detector.train_step(batch, wrapper)

    assert float(wrapper.last_regularization) == pytest.approx(weight * float(value), rel=1e-5)
    assert found.keys() == task.keys()
    share = 0.0
    for name, got in found.items():
        added = weight * extra[name] if name in extra else torch.zeros(())
        wanted = task[name].double() + added
        # The cosine does not depend on the step of a layer with one filter (rpn_cls): in fp32 two
        # terms of lambda / step cancel there, to 1.3e-5 instead of zero.
        assert torch.allclose(got.double(), wanted, rtol=1e-3, atol=2e-5), name
        share = max(share, float(added.norm() / wanted.norm()))
    # Else a missing or doubled term would hide behind the task's gradient.
    assert share > 0.2


def test_none_adds_nothing(detector: nn.Module, detector_config: Config, batch: Any) -> None:
    task = task_gradients_by_hand(detector_config, tiny.state_of(detector), batch)
    wrapper = regularized(detector, type='none')
    found = gradients_at_step(wrapper, detector)
    torch.manual_seed(7)
    detector.train_step(batch, wrapper)
    assert wrapper.last_regularization is None
    assert found.keys() == task.keys()
    for name, got in found.items():
        assert torch.allclose(got, task[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize('gradient', ['ste', 'sr_ste'])
def test_accumulated_batches_equal_the_big_batch(gradient: str) -> None:
    """For the loss, L_reg and SR-STE's decay, which is added in the backward pass."""
    recipe = dict(tiny.TOY_RECIPE, gradient=gradient)
    toy, twin = calibrated_toy(recipe=recipe), calibrated_toy(recipe=recipe)
    big = wrapper_of(twin)
    wanted = gradients_at_step(big, twin)
    twin.train_step(toy_batch(0, 8), big)

    wrapper = wrapper_of(toy, accumulative_counts=4)
    found = gradients_at_step(wrapper, toy)
    for first in range(0, 8, 2):
        assert not found
        toy.train_step(toy_batch(first, 2), wrapper)

    assert found.keys() == wanted.keys() == dict(toy.named_parameters()).keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7), name
    _, reg = l_reg_by_hand(calibrated_toy(), 'cosine', 'layer', 'exact')
    # The regularizer is a visible part of what was compared.
    assert (2 * reg['twice.weight']).norm() > 0.1 * wanted['twice.weight'].norm()


def test_frozen_layers_add_nothing(detector: nn.Module, batch: Any) -> None:
    detector.backbone.requires_grad_(False)
    value, _ = l_reg_by_hand(detector, 'cosine', 'layer', 'exact')
    frozen = {k: v for k, v in tiny.state_of(detector).items() if k.startswith('backbone.')}
    frozen = {k: v for k, v in frozen.items() if 'bn' not in k and 'downsample.1' not in k}
    wrapper = wrapper_of(detector)
    detector.train_step(batch, wrapper)
    assert float(wrapper.last_regularization) == pytest.approx(2 * float(value), rel=1e-5)
    after = tiny.state_of(detector)
    assert not [key for key in frozen if not torch.equal(frozen[key], after[key])]


def test_steps_of_frozen_stages_are_frozen_too(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """``frozen_stages`` freezes weights when it builds and again in every ``train()``."""
    model = tiny.build(tiny_config(tmp_path, model__backbone__frozen_stages=2)).train()
    for name, p in model.named_parameters():
        stage = name.startswith(('backbone.conv1', 'backbone.layer1', 'backbone.layer2'))
        if '.slope_' in name:
            assert p.requires_grad is not stage, name


def test_layers_that_did_not_run_add_nothing() -> None:
    toy = calibrated_toy(spare=True)
    with torch.no_grad():
        terms = {
            name: float(ByHand(layer, False).terms('cosine', 'layer'))
            for name, layer in compressed_layers(toy).items()
        }
    wrapper = wrapper_of(toy)
    found = gradients_at_step(wrapper, toy)
    toy.train_step(toy_batch(0, 4), wrapper)
    assert not [name for name in found if name.startswith('spare')]
    # It still counts in n, so that lambda means the same on every rank and in every step.
    ran = terms['first'] + terms['twice'] + terms['mix']
    assert float(wrapper.last_regularization) == pytest.approx(2 * ran / 4, rel=1e-5)


def test_a_layer_that_ran_in_an_earlier_step_adds_nothing() -> None:
    toy = calibrated_toy(spare=True)
    wrapper = wrapper_of(toy)
    with wrapper.optim_context(toy):
        loss = toy.spare(torch.ones(1, 8, 2, 2)).square().mean()
    wrapper.update_params(loss)
    with torch.no_grad():
        layers = compressed_layers(toy)
        ran = sum(
            float(ByHand(layers[name], False).terms('cosine', 'layer'))
            for name in ('first', 'twice', 'mix')
        )
    toy.train_step(toy_batch(0, 4), wrapper)
    assert float(wrapper.last_regularization) == pytest.approx(2 * ran / 4, rel=1e-5)
