"""The optim wrapper: lambda * L_reg once per step, steps in a group of their own, one W a step."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS, init_default_scope
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slope_mm
from slope_mm import ConfigError, RecipeError, compressed_layers
from slope_mm.engine import SlopeOptimWrapper
from slope_mm.layers import base

MakeConfig = Callable[..., Config]
CONSTRUCTOR = 'slope_mm.SlopeOptimWrapperConstructor'
SGD = dict(type='SGD', lr=0.1)


def wrapper_of(model: nn.Module, **options: Any) -> OptimWrapper:
    regularizer = dict(type='cosine', weight=2.0)
    settings = dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=regularizer, **options)
    wrapper = build_optim_wrapper(model, settings)
    # The Runner does this before it trains.
    wrapper.initialize_count_status(model, 0, wrapper._accumulative_counts)
    return wrapper


def regularized(model: nn.Module, **regularizer: Any) -> OptimWrapper:
    settings = dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=regularizer)
    return build_optim_wrapper(model, settings)


def gradients_at_step(wrapper: OptimWrapper, model: nn.Module) -> dict[str, Tensor]:
    """A dict that fills with the gradients that the optimizer is about to use."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        named = model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    wrapper.optimizer.register_step_pre_hook(keep)
    return found


@pytest.fixture(scope='module')
def detector_config(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp('unused'))


@pytest.fixture(scope='module')
def batch(detector_config: Config) -> Any:
    return tiny.first_batch(detector_config)


@pytest.fixture
def detector(detector_config: Config, slope_run: tiny.Run) -> nn.Module:
    """The Mask R-CNN of the finished run, calibrated."""
    model = tiny.build(detector_config)
    model.load_state_dict(slope_run.model.state_dict())
    return model.train()


def toy_batch(first: int, count: int) -> dict[str, list[Tensor]]:
    images = [tiny.ToyImages()[index] for index in range(first, first + count)]
    return {key: [image[key] for image in images] for key in images[0]}


@pytest.fixture
def toy() -> Iterator[nn.Module]:
    yield calibrated_toy()


def calibrated_toy(**options: Any) -> nn.Module:
    init_default_scope('mmengine')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(type='slope_mm.SlopeModel', arch='ToyNet', **{'recipe': tiny.TOY_RECIPE, **options})
    ).train()
    slope_mm.calibrate(model, [toy_batch(0, 8)])
    return model


# --- what is added to the loss -------------------------------------------------------------------


def kept_of_groups(weight: Tensor, axis: int, n: int, m: int) -> Tensor:
    """N:M by sorting each group, independently of slope_mm."""
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, m))
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.flatten(-2).movedim(-1, axis)


class ByHand:
    """A layer's L_reg term in plain float64 autograd: the formulas, written out."""

    def __init__(self, layer: Any, straight_through: bool) -> None:
        self.w = layer.weight.detach().double().requires_grad_()
        self.step = layer.slope_step.detach().double().requires_grad_()
        spec, axis = layer.slope_spec, layer.output_axis
        # Straight through the mask, or not at all.
        source = self.w if straight_through else self.w.detach()
        kept = source.numel()
        if spec.pattern is not None:
            mask = kept_of_groups(layer.weight.detach(), layer.input_axis, 2, 4)
            source = source + (source * mask - source).detach()
            kept = int(mask.sum())
        low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        scale = 1 / math.sqrt(kept / self.w.shape[axis] * high)
        step = self.step * scale + (self.step - self.step * scale).detach()
        v = (source / step).clamp(low, high)
        # Exact means that codes are constants: of W, and of the step that scales them.
        code = v + (v.round() - v).detach() if straight_through else v.round().detach()
        self.compressed = code * step
        self.axis = axis

    def terms(self, kind: str, granularity: str) -> Tensor:
        a, b = self.w, self.compressed
        if granularity == 'filter':
            a, b = (x.movedim(self.axis, 0).flatten(1) for x in (a, b))
        else:
            a, b = a.reshape(1, -1), b.reshape(1, -1)
        if kind == 'l2':
            return (a - b).square().sum(1) / a.square().sum(1)
        return 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def l_reg_by_hand(
    model: nn.Module, kind: str, granularity: str, gradient: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_reg over the trainable layers of a model and its gradients by parameter name."""
    terms, leaves = [], {}
    for name, layer in compressed_layers(model).items():
        if layer.weight.requires_grad:
            by_hand = ByHand(layer, gradient == 'ste')
            terms.append(by_hand.terms(kind, granularity))
            leaves[f'{name}.weight'], leaves[f'{name}.slope_step'] = by_hand.w, by_hand.step
    value = torch.cat(terms).mean()
    value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}


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


# --- groups and steps ----------------------------------------------------------------------------


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
    assert (step['lr'], step['weight_decay']) == (1e-3, 0.0)
    assert group_of(wrapper, conv.slope_act_step) is step
    fc = detector.roi_head.bbox_head.shared_fcs[0]
    assert group_of(wrapper, fc.weight)['lr'] == 1e-3


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
            assert (group['lr'], group['weight_decay']) == (1e-3, 0.0)
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
    with pytest.raises(ConfigError, match='step_lr_mult=-1.0 is negative'):
        wrapper_of(toy, step_lr_mult=-1)
    with pytest.raises(ConfigError, match='step_limit=1.0 is not a share'):
        wrapper_of(toy, step_limit=1.0)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing_trains_alike(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        """Two layers whose activations are recomputed in the backward pass, or not."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.recompute = False

        def forward(self, x: Tensor) -> Tensor:
            if self.recompute:
                return checkpoint(self.layers, x, use_reentrant=use_reentrant)
            return self.layers(x)

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
