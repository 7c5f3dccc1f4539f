"""Learned steps have a parameter group of their own, and move by no more than their limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS, init_default_scope
from torch import nn
from wrapper_cases import (
    CONSTRUCTOR,
    SGD,
    calibrated_toy,
    gradients_at_step,
    l_reg_by_hand,
    toy_batch,
    wrapper_of,
)

import slope_mm
from slope_mm import ConfigError
from slope_mm.engine import SlopeOptimWrapper
from slope_mm.engine.launch import check_optim_wrapper

MakeConfig = Callable[..., Config]


def group_of(wrapper: OptimWrapper, p: nn.Parameter) -> dict[str, Any]:
    groups = [g for g in wrapper.optimizer.param_groups if any(p is q for q in g['params'])]
    assert len(groups) == 1, 'a parameter has to be in one group'
    return groups[0]


def test_steps_have_a_group_of_their_own(detector: nn.Module) -> None:
    wrapper = build_optim_wrapper(
        detector,
        dict(
            constructor=CONSTRUCTOR,
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            regularizer=dict(type='cosine'),
            step_lr_mult=0.25,
        ),
    )
    assert type(wrapper) is SlopeOptimWrapper
    names = {id(p): name for name, p in detector.named_parameters()}
    groups = wrapper.optimizer.param_groups
    assert sorted(names.values()) == sorted(names[id(p)] for g in groups for p in g['params'])
    rest, steps = groups
    assert all('.slope_' in names[id(p)] for p in steps['params'])
    assert not any('.slope_' in names[id(p)] for p in rest['params'])
    assert (rest['lr'], rest['weight_decay']) == (1e-3, 0.05)
    assert (steps['lr'], steps['weight_decay']) == (0.25e-3, 0.0)


class OwnName(nn.Module):
    """Has a parameter that is named as if it were a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.slope_gain = nn.Parameter(torch.ones(8))


def test_a_models_own_parameter_is_no_step_whatever_its_name() -> None:
    model = OwnName()
    slope_mm.convert(model, tiny.TOY_RECIPE)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor=CONSTRUCTOR,
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            regularizer=dict(type='cosine'),
            step_lr_mult=0.25,
        ),
    )
    assert group_of(wrapper, model.slope_gain) is group_of(wrapper, model.conv.weight)
    assert group_of(wrapper, model.slope_gain)['weight_decay'] == 0.05
    assert group_of(wrapper, model.conv.slope_step)['weight_decay'] == 0.0


def test_paramwise_settings_of_the_weights_survive(detector: nn.Module) -> None:
    wrapper = build_optim_wrapper(
        detector,
        dict(
            constructor=CONSTRUCTOR,
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            regularizer=dict(type='cosine'),
            paramwise_cfg=dict(
                norm_decay_mult=0.0, custom_keys={'backbone': dict(lr_mult=0.1, decay_mult=0.5)}
            ),
        ),
    )
    conv = detector.backbone.layer1[0].conv1
    weight, step = group_of(wrapper, conv.weight), group_of(wrapper, conv.slope_step)
    assert (weight['lr'], weight['weight_decay']) == (pytest.approx(1e-4), pytest.approx(0.025))
    # Steps are learned at the rate of their layer.
    assert (step['lr'], step['weight_decay']) == (pytest.approx(1e-4), 0.0)
    assert group_of(wrapper, conv.slope_act_step) is step
    fc = detector.roi_head.bbox_head.shared_fcs[0]
    assert group_of(wrapper, fc.weight)['lr'] == 1e-3
    assert group_of(wrapper, fc.slope_step)['lr'] == 1e-3
    steps = tiny.steps_of(detector)
    groups = {id(group_of(wrapper, p)) for n, p in detector.named_parameters() if n in steps}
    assert len(groups) == 2


class TinyConvNeXt(nn.Module):
    """As much of a ConvNeXt as mmdet's layer-decay constructor looks at: names."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        self.stages = nn.ModuleList(nn.ModuleList([nn.Conv2d(8, 8, 3)]) for _ in range(4))


@MODELS.register_module(force=True)
class LayeredNet(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyConvNeXt()
        self.tower = nn.Conv2d(8, 8, 1)

    def forward(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError


def test_layer_decay_constructor_can_be_wrapped() -> None:
    init_default_scope('mmdet')
    model = MODELS.build(
        dict(type='slope_mm.SlopeModel', arch='LayeredNet', recipe=tiny.TOY_RECIPE)
    )
    settings = dict(
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        paramwise_cfg=dict(decay_rate=0.5, decay_type='layer_wise', num_layers=6),
    )
    stock = MODELS.build(dict(type='LayeredNet'))
    wanted = LearningRateDecayOptimizerConstructor(
        dict(type='OptimWrapper', optimizer=dict(settings['optimizer'])), settings['paramwise_cfg']
    )(stock)
    wrapper = build_optim_wrapper(
        model,
        dict(
            settings,
            constructor=CONSTRUCTOR,
            base_constructor='LearningRateDecayOptimizerConstructor',
            regularizer=dict(type='cosine'),
        ),
    )
    stock_parameters = dict(stock.named_parameters())
    for name, p in model.named_parameters():
        group = group_of(wrapper, p)
        if '.slope_' in name:
            weight = model.get_parameter(f'{name.rpartition(".")[0]}.weight')
            assert (group['lr'], group['weight_decay']) == (group_of(wrapper, weight)['lr'], 0.0)
        else:
            same = group_of(wanted, stock_parameters[name])
            assert (group['lr'], group['weight_decay']) == (same['lr'], same['weight_decay'])
    assert group_of(wrapper, model.backbone.stages[0][0].weight)['lr'] < 1e-4


@OPTIM_WRAPPERS.register_module(force=True)
class NoisyOptimWrapper(OptimWrapper):
    """Someone's own wrapper."""

    def __init__(self, *args: Any, noise: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise, self.steps_done = noise, 0

    def step(self, **kwargs: Any) -> None:
        self.steps_done += 1
        super().step(**kwargs)


def test_any_wrapper_type_can_be_regularized(toy: nn.Module) -> None:
    value, _ = l_reg_by_hand(toy, 'cosine', 'layer', 'exact')
    wrapper = wrapper_of(toy, type='NoisyOptimWrapper', noise=0.5)
    toy.train_step(toy_batch(0, 4), wrapper)
    assert isinstance(wrapper, NoisyOptimWrapper)
    assert (wrapper.noise, wrapper.steps_done) == (0.5, 1)
    assert float(wrapper.last_regularization) == pytest.approx(2 * float(value), rel=1e-5)
    # A second one must not meet a class that was made for the first.
    assert type(wrapper_of(calibrated_toy())) is SlopeOptimWrapper


def test_the_wrapper_may_be_named_directly(toy: nn.Module) -> None:
    value, _ = l_reg_by_hand(toy, 'cosine', 'layer', 'exact')
    wrapper = build_optim_wrapper(
        toy,
        dict(
            type='slope_mm.SlopeOptimWrapper',
            optimizer=SGD,
            regularizer=dict(type='cosine', weight=3.0),
        ),
    )
    toy.train_step(toy_batch(0, 4), wrapper)
    assert float(wrapper.last_regularization) == pytest.approx(3 * float(value), rel=1e-5)


@pytest.mark.parametrize('constructor', [None, CONSTRUCTOR])
def test_steps_with_weight_decay_are_told_of(
    toy: nn.Module, constructor: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(
        type='slope_mm.SlopeOptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        regularizer=dict(type='none'),
    )
    wrapper = build_optim_wrapper(
        toy, {**options, **({'constructor': constructor} if constructor else {})}
    )
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            toy.train_step(toy_batch(0, 4), wrapper)
    finally:
        logger.removeHandler(caplog.handler)
    told = caplog.text.count('6 quantization steps have weight decay')
    assert told == (0 if constructor else 1)


def test_an_optimizer_that_deals_out_parameters_is_refused(toy: nn.Module) -> None:
    optimizer = dict(type='ZeroRedundancyOptimizer', optimizer_type='AdamW', lr=1e-3)
    options = dict(constructor=CONSTRUCTOR, optimizer=optimizer, regularizer=dict(type='none'))
    message = 'ZeroRedundancyOptimizer.*optimizer_type as the type'
    with pytest.raises(ConfigError, match=message):
        build_optim_wrapper(toy, options)
    # Tools ask before they write anything.
    with pytest.raises(ConfigError, match=message):
        check_optim_wrapper(options)


def test_steps_stay_positive_after_a_huge_update(toy: nn.Module) -> None:
    wrapper = wrapper_of(toy, step_lr_mult=1e7, step_limit=0.25)
    before, found = tiny.steps_of(toy), gradients_at_step(wrapper, toy)
    toy.train_step(toy_batch(0, 4), wrapper)
    crossed = [name for name, step in before.items() if (step < 1e6 * found[name]).any()]
    assert len(crossed) > 2, 'the update was not huge'
    for name, step in tiny.steps_of(toy).items():
        assert (step > 0).all(), name
        assert step.dtype == torch.float32, name
        # No step moves by more than the limit, and those that would have move by all of it.
        change = step / before[name] - 1
        assert change.abs().max() <= 0.25 + 1e-6, name
        far = (1e6 * found[name]).abs() > 0.3 * before[name]
        assert torch.allclose(change[far].abs(), torch.tensor(0.25)), name
    assert toy.train_step(toy_batch(0, 4), wrapper)['loss'].isfinite()


def test_small_updates_of_steps_are_the_optimizers_own(toy: nn.Module) -> None:
    wrapper = wrapper_of(toy, step_lr_mult=2e-3)
    before, found = tiny.steps_of(toy), gradients_at_step(wrapper, toy)
    toy.train_step(toy_batch(0, 4), wrapper)
    after = tiny.steps_of(toy)
    assert len(tiny.differing(before, after)) > 3
    for name, step in after.items():
        assert torch.allclose(step, before[name] - 2e-4 * found[name], rtol=1e-6), name


def test_a_step_that_crossed_zero_is_folded_and_kept_within_the_limit() -> None:
    model = slope_mm.convert(nn.Sequential(nn.Linear(16, 4)), dict(weight=dict(bits=4)))
    wrapper = build_optim_wrapper(
        model,
        dict(constructor=CONSTRUCTOR, optimizer=dict(SGD, lr=0.0), regularizer=dict(type='none')),
    )
    before = model[0].step.detach().clone()
    with torch.no_grad():
        model[0].slope_step[0].neg_()
    for _ in range(20):
        with wrapper.optim_context(model):
            loss = model(torch.randn(8, 16)).square().mean()
        wrapper.update_params(loss)
    torch.testing.assert_close(model[0].slope_step.detach(), before)


# The update makes the smallest step a little smaller, or larger.
@pytest.mark.parametrize('sign', [1, -1])
def test_weights_of_zero_get_a_usual_step_when_they_move(sign: int) -> None:
    """Odd levels have no zero: beside the smallest step all that is learned would be clipped."""
    recipe = dict(weight=dict(bits=4, codes='odd'))
    model = slope_mm.convert(nn.Sequential(nn.Linear(16, 4)), recipe)
    nn.init.zeros_(model[0].weight)
    wrapper = build_optim_wrapper(
        model, dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=dict(type='none'))
    )
    with wrapper.optim_context(model):
        loss = sign * model(torch.ones(8, 16)).sum()
    wrapper.update_params(loss)
    # That of weights of variance 1 / 16, whose largest level is 7.5 steps.
    wanted = torch.full((4, 1), 1 / (4 * 7.5))
    torch.testing.assert_close(model[0].slope_step.detach(), wanted)
