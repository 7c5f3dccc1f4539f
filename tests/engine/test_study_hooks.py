"""Hooks that studies compare: first steps, batch norm statistics, and the gradients' ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import Tensor

import slope_mm
from slope_mm import ConfigError, SlopeBatchNormHook, SlopeStepInitHook, compressed_layers
from slope_mm.engine.calibration import evenly_spread_batches
from slope_mm.engine.hooks.batch_norm import re_estimate
from slope_mm.ops import STEP_INITS, compress_weight, lsq_init_step

BATCH = 4


class FirstSteps(tiny.Observer):
    """The steps that training begins with."""

    def before_train(self, runner: Any) -> None:
        self.weights = {
            n: layer.weight.detach().clone() for n, layer in compressed_layers(runner.model).items()
        }
        self.steps = tiny.steps_of(runner.model)


def train_toy(work_dir: Path, *hooks: dict[str, Any], observer: Any = None, **options: Any) -> Any:
    config = tiny.toy_config(work_dir, BATCH, custom_hooks=list(hooks), **options)
    return tiny.train(config, *([observer] if observer else []))


# --- first steps ---------------------------------------------------------------------------------


def test_steps_begin_with_the_formula(tmp_path: Path) -> None:
    seen = FirstSteps()
    train_toy(tmp_path, dict(type='slope_mm.SlopeStepInitHook', method='lsq'), observer=seen)
    assert len(seen.weights) == 3
    for name, w in seen.weights.items():
        # 2 * mean|w| / sqrt(7) over the two largest of every four input channels.
        groups = w.reshape(w.shape[0], -1, 4, w[0, 0].numel()).abs()
        kept = groups.sort(2).values[:, :, 2:].flatten(1)
        expected = 2 * kept.mean(1) / 7**0.5
        torch.testing.assert_close(seen.steps[f'{name}.slope_step'].flatten(), expected)


@pytest.mark.parametrize('method', sorted(STEP_INITS))
def test_channels_of_zeros_begin_with_a_usual_step(method: str, tmp_path: Path) -> None:
    class Emptied(FirstSteps):
        priority = 'VERY_HIGH'

        def before_train(self, runner: Any) -> None:
            with torch.no_grad():
                runner.model.mix.weight[1] = 0

    options = dict(train_cfg__max_iters=1)
    hook = dict(type='slope_mm.SlopeStepInitHook', method=method)
    model = train_toy(tmp_path, hook, observer=Emptied(), **options).model
    # Of the size that a layer's weights usually have.
    step = model.mix.slope_step.detach()
    assert 0.1 < float(step[1] / step[0]) < 10


def test_a_resumed_run_keeps_its_steps(tmp_path: Path) -> None:
    hook = dict(type='slope_mm.SlopeStepInitHook', method='lsq')
    first = train_toy(tmp_path, hook)
    seen = FirstSteps()
    options = dict(resume=True, load_from=str(first.checkpoint), train_cfg__max_iters=3)
    train_toy(tmp_path / 'more', hook, observer=seen, **options)
    assert not tiny.differing(seen.steps, tiny.steps_of(first.model))


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_least_squares_is_never_worse_than_the_formula(bits: int) -> None:
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    codes = slope_mm.ops.weight_codes('lsq', bits)
    errors = {
        name: (compress_weight(w, rule(w, codes), None, codes) - w).square().sum(1)
        for name, rule in STEP_INITS.items()
    }
    assert bool((errors['least_squares'] <= errors['lsq'] + 1e-6).all())
    assert torch.equal(STEP_INITS['lsq'](w, codes), lsq_init_step(w, codes))


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="method='lqs' is unknown.*nearest: 'lsq'"):
        SlopeStepInitHook('lqs')


# --- batch norms ---------------------------------------------------------------------------------


def statistics(model: Any) -> tuple[Tensor, Tensor]:
    return model.norm.running_mean.clone(), model.norm.running_var.clone()


def hook(policy: str, **more: Any) -> dict[str, Any]:
    return dict(type='slope_mm.SlopeBatchNormHook', policy=policy, **more)


def test_frozen_statistics_stay_and_adapting_ones_do_not(tmp_path: Path) -> None:
    # The model freezes its norm itself, or does not: the hook decides.
    adapting = train_toy(tmp_path / 'a', hook('adapting'), model__norm_eval=True).model
    frozen = train_toy(tmp_path / 'f', hook('frozen'), model__norm_eval=False).model
    assert torch.equal(statistics(frozen)[0], torch.zeros(8))
    assert torch.equal(statistics(frozen)[1], torch.ones(8))
    assert float(statistics(adapting)[0].abs().max()) > 0.01


@pytest.mark.parametrize('policy', ['frozen', 'adapting'])
def test_inputs_are_calibrated_with_norms_as_they_train(policy: str, tmp_path: Path) -> None:
    modes = []

    class Modes(tiny.Observer):
        priority = 'VERY_HIGH'

        def before_train(self, runner: Any) -> None:
            runner.model.norm.register_forward_hook(lambda norm, *_: modes.append(norm.training))

    calibration = dict(type='slope_mm.SlopeCalibrationHook', batches=1)
    options = dict(observer=Modes(), train_cfg__max_iters=2, model__norm_eval=policy != 'frozen')
    train_toy(tmp_path, calibration, hook(policy), **options)
    # Of the calibration and two iterations.
    assert len(modes) == 3 and set(modes) == {policy == 'adapting'}


def test_re_estimated_statistics_are_those_of_the_final_weights(tmp_path: Path) -> None:
    run = train_toy(tmp_path, hook('re-estimated', batches=3))
    model = run.model
    means, variances = [], []
    for first in (0, 21, 42):
        # 64 images, 12 of them evenly spread.
        images = [(first // 21 * BATCH + i) * 64 // 12 for i in range(BATCH)]
        x = torch.stack([tiny.ToyImages()[i]['image'] for i in images])
        layer = compressed_layers(model)['first']
        with torch.no_grad():
            out = layer(x)
        values = out.movedim(1, 0).flatten(1)
        means.append(values.mean(1))
        variances.append(values.var(1))
    mean, var = statistics(model)
    torch.testing.assert_close(mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    # What is saved is what was estimated; the norm's own settings are as before.
    saved = torch.load(run.checkpoint, weights_only=False)['state_dict']
    assert torch.equal(saved['norm.running_mean'], mean)
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_averaged_weights_have_re_estimated_statistics_of_their_own(
    tmp_path: Path, first: int, update_buffers: bool, by_epoch: bool
) -> None:
    hooks = [hook('re-estimated', batches=3)]
    hooks.insert(first, dict(type='EMAHook', momentum=0.3, update_buffers=update_buffers))
    config = tiny.toy_config(tmp_path, BATCH, custom_hooks=hooks, model__norm_eval=False)
    if by_epoch:
        config.train_cfg = dict(by_epoch=True, max_epochs=1)
        config.default_hooks.checkpoint.by_epoch = True
    run = tiny.train(config)
    loader, model = run.runner.train_dataloader, run.model
    ema = next(h for h in run.runner.hooks if hasattr(h, 'ema_model'))
    own = tiny.state_of(model)
    saved = torch.load(run.checkpoint, weights_only=False)['state_dict']
    assert not torch.equal(saved['first.weight'], own['first.weight'])
    # What an evaluation computes with.
    ema.before_val_epoch(run.runner)
    evaluated = statistics(model)
    ema.after_val_epoch(run.runner)
    model.load_state_dict(saved)
    re_estimate(model, evenly_spread_batches(loader, 3))
    keys = 'norm.running_mean', 'norm.running_var'
    for key, wanted, used in zip(keys, statistics(model), evaluated, strict=True):
        torch.testing.assert_close(saved[key], wanted)
        torch.testing.assert_close(used, wanted)
    if update_buffers:
        model.load_state_dict(own)
        re_estimate(model, evenly_spread_batches(loader, 3))
        torch.testing.assert_close(own[keys[1]], statistics(model)[1])
        assert not torch.allclose(own[keys[1]], saved[keys[1]], rtol=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(policy='freeze'), "policy='freeze' is unknown.*nearest: 'frozen'"),
        (dict(policy='re-estimated', batches=0), 'batches=0'),
    ],
)
def test_bad_policies_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlopeBatchNormHook(**options)


def test_re_estimation_is_refused_where_training_may_stop_before_it(tmp_path: Path) -> None:
    early = dict(type='EarlyStoppingHook', monitor='accuracy')
    config = tiny.toy_config(tmp_path, BATCH, custom_hooks=[hook('re-estimated'), early])
    with pytest.raises(ConfigError, match='EarlyStoppingHook may not reach'):
        tiny.train(config)
    assert not list(tmp_path.rglob('*.pth'))
    config = tiny.toy_config(tmp_path, BATCH, custom_hooks=[hook('adapting'), early])
    assert tiny.train(config).checkpoint


# --- gradients -----------------------------------------------------------------------------------


def toy_model() -> Any:
    torch.manual_seed(0)
    return MODELS.build(dict(type='slope_mm.SlopeModel', arch='ToyNet', recipe=tiny.TOY_RECIPE))


def toy_data() -> dict[str, list[Tensor]]:
    images = [tiny.ToyImages()[index] for index in range(BATCH)]
    return {key: [image[key] for image in images] for key in images[0]}


def norm_of_gradients(model: Any, loss: Tensor) -> float:
    weights = [layer.weight for layer in compressed_layers(model).values()]
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return float(torch.cat([w.grad.flatten() for w in weights]).norm())


def test_the_ratio_is_that_of_two_separate_backward_passes() -> None:
    model = toy_model()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='slope_mm.SlopeOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.0),
            regularizer=dict(type='cosine', weight=7.0),
        ),
    )
    # Calibrates the inputs; lr is zero.
    model.train_step(toy_data(), wrapper)
    assert wrapper.gradient_ratio is None
    wrapper.watch_gradients = True
    model.train_step(toy_data(), wrapper)
    model.slope_in_step = True
    task = norm_of_gradients(model, model(**toy_data(), mode='loss')['loss'])
    added = norm_of_gradients(model, 7.0 * slope_mm.regularization(model, 'cosine'))
    assert float(wrapper.gradient_ratio) == pytest.approx(added / task, rel=1e-4)
    assert not wrapper.watch_gradients


def test_the_monitor_logs_the_ratio_and_changes_nothing(tmp_path: Path) -> None:
    rows = {}
    for gradients in (False, True):
        work_dir = tmp_path / str(gradients)
        monitor = dict(
            type='slope_mm.SlopeMonitorHook', interval=1, picture=False, gradients=gradients
        )
        train_toy(work_dir, monitor)
        rows[gradients] = tiny.read_losses(work_dir)
    assert all(row.pop('slope_gradient_ratio') > 0 for row in rows[True])
    assert rows[True] == rows[False]
