"""The optim wrapper in a step: one compressed weight, precision, recomputation, mistakes."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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
from slope_mm import ConfigError, RecipeError, compressed_layers
from slope_mm.engine import SlopeOptimWrapper
from slope_mm.layers import base

MakeConfig = Callable[..., Config]


# --- one compressed weight a step ----------------------------------------------------------------


def test_one_weight_for_all_pyramid_levels_and_gone_afterwards(
    detector: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {layer.weight.data_ptr(): n for n, layer in compressed_layers(detector).items()}
    computed: Counter[str] = Counter()
    compress = base.compress_with_powers

    def counting(w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        computed[names[w.data_ptr()]] += 1
        return compress(w, *args, **kwargs)

    monkeypatch.setattr(base, 'compress_with_powers', counting)
    conv, seen = detector.rpn_head.rpn_conv, []
    references = []

    def watch(module: Any, *_: Any) -> None:
        weight = module.compressed_weight()
        seen.append(id(weight))
        references.append(weakref.ref(weight))

    handle = conv.register_forward_hook(watch)
    wrapper = wrapper_of(detector)
    detector.train_step(batch, wrapper)
    handle.remove()
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert computed == dict.fromkeys(names.values(), 1)

    gc.collect()
    assert all(reference() is None for reference in references)

    # The next step computes with the new weight.
    before = conv.compressed_weight().detach().clone()
    detector.train_step(batch, wrapper)
    assert not torch.equal(before, conv.compressed_weight())


def test_nothing_of_a_step_holds_its_graph(toy: nn.Module) -> None:
    wrapper = wrapper_of(toy)
    toy.train_step(toy_batch(0, 4), wrapper)
    assert wrapper.last_regularization is not None
    assert wrapper.last_regularization.grad_fn is None


def test_a_step_that_fails_leaves_nothing_behind(detector: nn.Module, batch: Any) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError('too many proposals')

    wrapper, conv = wrapper_of(detector), detector.rpn_head.rpn_conv
    detector.roi_head.bbox_head.shared_fcs[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match='too many proposals'):
        detector.train_step(batch, wrapper)
    before = conv.compressed_weight().detach().clone()
    with torch.no_grad():
        conv.weight.mul_(0.5)
    assert not torch.equal(before, conv.compressed_weight())
    # Nor is the guard against a lost regularizer left open.
    data = detector.data_preprocessor(batch, True)
    with pytest.raises(ConfigError, match='knows no regularizer'):
        detector(**data, mode='loss')


def test_decay_is_scaled_as_the_losses_of_the_last_update_too(toy: nn.Module) -> None:
    """Five iterations in updates of two: the last one stands alone."""
    wrapper = wrapper_of(toy, accumulative_counts=2)
    wrapper.initialize_count_status(toy, 0, 5)
    factors = []
    toy.twice.register_forward_hook(lambda layer, *_: factors.append(layer.loss_factor))
    for _ in range(5):
        toy.train_step(toy_batch(0, 4), wrapper)
    assert factors[::2] == [0.5] * 4 + [1.0]


@pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='needs torch 2.3, whose loss scaler knows CPUs'
)
def test_decay_follows_the_scale_of_the_losses() -> None:
    """The decay of pruned weights is no part of the loss, whose gradient a loss scaler enlarges."""
    toy = calibrated_toy(recipe=dict(tiny.TOY_RECIPE, gradient='sr_ste'))
    gradients = []
    for scale in (1.0, 1024.0):
        wrapper = wrapper_of(toy)
        wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        with wrapper.optim_context(toy):
            data = toy.data_preprocessor(toy_batch(0, 4), True)
            loss, _ = toy.parse_losses(toy._run_forward(data, mode='loss'))
        toy.zero_grad()
        (scale * loss).backward()
        gradients.append(toy.twice.weight.grad / scale)
    decay = 2e-4 * toy.twice.weight.detach() * ~toy.twice.mask
    assert decay.norm() > 1e-4
    assert (gradients[0] - gradients[1]).norm() < 0.01 * decay.norm()


# --- mixed precision -----------------------------------------------------------------------------


def test_bf16_autocast_keeps_steps_and_regularizer_in_fp32(toy: nn.Module) -> None:
    value, _ = l_reg_by_hand(toy, 'cosine', 'layer', 'exact')
    wrapper = wrapper_of(toy)
    found = gradients_at_step(wrapper, toy)
    dtypes = set()
    toy.twice.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with wrapper.optim_context(toy):
            data = toy.data_preprocessor(toy_batch(0, 4), True)
            loss, _ = toy.parse_losses(toy._run_forward(data, mode='loss'))
        wrapper.update_params(loss)
    assert dtypes == {torch.bfloat16}, 'autocast was not in force'
    assert wrapper.last_regularization.dtype == torch.float32
    # bf16 resolves 1 - cos to about 4e-3.
    assert float(wrapper.last_regularization) == pytest.approx(2 * float(value), rel=1e-5)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in found.values())
    assert all((g != 0).any() for name, g in found.items() if 'slope_' in name)
    for name, step in tiny.steps_of(toy).items():
        assert step.dtype == torch.float32
        assert (step > 0).all(), name


def test_calibration_on_the_first_batch_leaves_every_gradient_its_way() -> None:
    """torch 2.1 keeps autocast's copies of a forward that had no graph for the next one."""
    init_default_scope('mmengine')
    recipe = dict(tiny.TOY_RECIPE, rules=[dict(match='mix', compress=False)])
    model = MODELS.build(dict(type='slope_mm.SlopeModel', arch='ToyNet', recipe=recipe)).train()
    wrapper = wrapper_of(model, type='SlopeAmpOptimWrapper')
    found = gradients_at_step(wrapper, model)
    model.train_step(toy_batch(0, 4), wrapper)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


# --- mistakes ------------------------------------------------------------------------------------


class Stopwatch(tiny.Observer):
    """Notes whether an iteration was ever finished."""

    finished = 0

    def after_train_iter(self, *_: Any, **__: Any) -> None:
        self.finished += 1


def test_a_lost_regularizer_is_an_error_before_the_first_iteration(
    tiny_config: MakeConfig, tmp_path: Path, dense_run: tiny.Run
) -> None:
    """As after the stock ``--amp`` and an ``optim_wrapper`` that replaces ours."""
    config = tiny_config(tmp_path, load_from=str(dense_run.checkpoint))
    config.optim_wrapper = dict(type='OptimWrapper', optimizer=SGD)
    watch = Stopwatch()
    with pytest.raises(ConfigError, match=r'knows no regularizer.*SlopeOptimWrapperConstructor'):
        tiny.train(config, watch)
    assert watch.finished == 0
    assert not list(tmp_path.glob('*.pth'))


def test_the_type_that_stock_amp_rewrites_does_not_matter(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, validate=False)
    config.optim_wrapper.type = 'OptimWrapper'
    assert type(tiny.train(config).runner.optim_wrapper) is SlopeOptimWrapper


def test_the_constructor_asks_for_a_regularizer(toy: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no regularizer.*type='none'"):
        build_optim_wrapper(toy, dict(constructor=CONSTRUCTOR, optimizer=SGD))


@pytest.mark.parametrize(
    ('regularizer', 'error', 'message'),
    [
        (dict(type='cosin'), RecipeError, "nearest: 'cosine'"),
        (dict(type='cosine', granularity='row'), RecipeError, 'filter'),
        (dict(type='cosine', wieght=1.0), ConfigError, "'wieght'; nearest: 'weight'"),
        (dict(type='cosine', weight=-1.0), ConfigError, 'weight=-1.0'),
        (dict(type='cosine', gradient='st'), ConfigError, "nearest: 'ste'"),
        ('cosine', ConfigError, 'write regularizer=dict'),
    ],
    ids=str,
)
def test_bad_regularizers(
    toy: nn.Module, regularizer: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_optim_wrapper(
            toy, dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=regularizer)
        )


def test_bad_settings_of_the_steps(toy: nn.Module) -> None:
    with pytest.raises(ConfigError, match='step_lr_mult=-1 is no number >= 0'):
        wrapper_of(toy, step_lr_mult=-1)
    with pytest.raises(ConfigError, match='step_limit=1.0 is not a share'):
        wrapper_of(toy, step_limit=1.0)
    with pytest.raises(ConfigError, match="step_limit='half' is not a share"):
        wrapper_of(toy, step_limit='half')
    with pytest.raises(ConfigError, match="compile='no' is neither True nor False"):
        wrapper_of(toy, compile='no')


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing_trains_alike(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        """Layers whose activations are recomputed in the backward pass, or not; one runs twice."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.recompute = False

        def forward(self, x: Tensor) -> Tensor:
            # Torch 2.1 does not tell that it will recompute.
            known = hasattr(torch._C._autograd, '_top_saved_tensors_default_hooks')
            for part in (self.layers, self.layers[2])[: 1 + (use_reentrant or known)]:
                recompute = checkpoint if self.recompute else None
                x = recompute(part, x, use_reentrant=use_reentrant) if recompute else part(x)
            return x

    def trained(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = slope_mm.convert(Checkpointed(), tiny.TOY_RECIPE)
        model.recompute = recompute
        wrapper = SlopeOptimWrapper(
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            regularizer=dict(type='cosine', weight=1.0),
        )
        x = torch.randn(4, 8, requires_grad=True)
        for _ in range(3):
            with wrapper.optim_context(model):
                loss = model(x).square().mean()
            wrapper.update_params(loss)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    plain, recomputed = trained(False), trained(True)
    for name, value in plain.items():
        # Summed in another order: the regularizer's part and the task's come apart.
        torch.testing.assert_close(value, recomputed[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('first', [False, True], ids=['alone', 'behind a layer'])
def test_gradients_that_checkpointing_keeps_back_are_not_compared(first: bool) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model = slope_mm.convert(layers, dict(weight=dict(sparsity='2:4', bits=4)))
    wrapper = SlopeOptimWrapper(
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        regularizer=dict(type='cosine', weight=1.0),
    )
    x = torch.randn(4, 8, requires_grad=True)
    with wrapper.optim_context(model):
        x = model[0](x) if first else x
        loss = model[2](checkpoint(model[1], x, use_reentrant=True)).square().mean()
    wrapper.watch_gradients = True
    with pytest.raises(ConfigError, match='reentrant activation checkpointing'):
        wrapper.update_params(loss)


def test_a_wrapper_that_is_named_directly_asks_for_its_regularizer(toy: nn.Module) -> None:
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match='has no regularizer'):
        SlopeOptimWrapper(optimizer=optimizer)
    named = dict(type='slope_mm.SlopeOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(ConfigError, match='has no regularizer'):
        build_optim_wrapper(toy, named)
    wrapper = build_optim_wrapper(toy, dict(named, regularizer=dict(type='l2'), step_limit=0.1))
    assert (wrapper.regularizer.type, wrapper.step_limit) == ('l2', 0.1)
    both = dict(named, constructor='slope_mm.SlopeOptimWrapperConstructor')
    wrapper = build_optim_wrapper(toy, dict(both, regularizer=dict(type='cosine', weight=2.0)))
    assert wrapper.regularizer.weight == 2.0
