"""Calibration: every quantized input gets its range and sign, and nothing else is touched."""

from __future__ import annotations

import random
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import slope_mm
from slope_mm import ConfigError, SlopeCalibrationHook, compressed_layers
from slope_mm.engine.calibration import (
    copied_samples,
    evenly_spread_batches,
    uncalibrated_layers,
)
from slope_mm.engine.calibration_images import run_losses

MakeConfig = Callable[..., Config]
OWN_HOOK = 'slope_mm.SlopeCalibrationHook'


def random_states() -> tuple[Any, ...]:
    """Python's, numpy's and torch's, as something to compare."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


def signs(model: nn.Module) -> dict[str, bool | None]:
    return {name: layer.activation_signed for name, layer in compressed_layers(model).items()}


class Probe(tiny.Observer):
    """Notes what is there when an iteration begins."""

    def __init__(self) -> None:
        self.signs: list[dict[str, bool | None]] = []
        self.steps: list[dict[str, Tensor]] = []
        self.random_states: list[tuple[Any, ...]] = []
        self.images: list[list[tuple[int, bool]]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.signs.append(signs(runner.model))
        self.steps.append(tiny.steps_of(runner.model))
        self.random_states.append(random_states())
        samples = data_batch['data_samples']
        self.images.append([(s.img_id, bool(s.get('flip', False))) for s in samples])


def without(config: Config, *types: str) -> Config:
    config.custom_hooks = [hook for hook in config.custom_hooks if hook.type not in types]
    return config


@pytest.fixture(scope='module')
def probed(
    tiny_config: MakeConfig, dense_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory
) -> Probe:
    """What a run with the hook looked like; its epochs are not seeded anew."""
    config = tiny_config(
        tmp_path_factory.mktemp('probed'), load_from=str(dense_run.checkpoint), validate=False
    )
    probe = Probe()
    tiny.train(without(config, 'slope_mm.EpochSeedHook'), probe)
    return probe


@pytest.fixture
def config(tiny_config: MakeConfig, tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


@pytest.fixture
def detector(config: Config, dense_run: tiny.Run) -> nn.Module:
    """A SlopeModel with the dense run's weights, in training mode, not calibrated."""
    model = tiny.build(config)
    model.load_state_dict(dense_run.model.state_dict())
    return model.train()


# --- what is found -------------------------------------------------------------------------------


def test_all_signs_are_known_and_right_before_the_first_iteration(probed: Probe) -> None:
    found = probed.signs[0]
    # The image, what the FPN adds up, and what RoIAlign cuts out of that, take both signs.
    signed = {'backbone.conv1', 'rpn_head.rpn_conv', 'roi_head.bbox_head.shared_fcs.0'}
    signed |= {f'neck.fpn_convs.{level}.conv' for level in range(4)}
    signed |= {'roi_head.mask_head.convs.0.conv'}
    assert {name for name, sign in found.items() if sign} == signed
    # Everything else reads the output of a ReLU.
    assert {name for name, sign in found.items() if sign is False} == found.keys() - signed


@pytest.mark.parametrize(
    'name', ['backbone.conv1', 'backbone.layer2.0.conv1', 'roi_head.bbox_head.shared_fcs.0']
)
def test_the_step_is_about_the_best_one(detector: nn.Module, config: Config, name: str) -> None:
    layer, inputs = detector.get_submodule(name), []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().numpy()))
    assert slope_mm.calibrate(detector, [tiny.first_batch(config, 4)]) == 38
    x = np.concatenate([value.ravel() for value in inputs])
    bits = layer.slope_spec.activation_bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if x.min() < 0 else (0, 2**bits - 1)

    def error(step: float) -> float:
        return float(np.square(np.clip(np.round(x / step), low, high) * step - x).mean())

    best = min(error(np.abs(x).max() * share / high) for share in np.linspace(0.05, 1.2, 200))
    assert error(float(layer.slope_act_step)) < 1.15 * best


def test_calibrated_layers_stay_as_they_are(detector: nn.Module, config: Config) -> None:
    batch = tiny.first_batch(config)
    slope_mm.calibrate(detector, [batch])
    before = tiny.state_of(detector)
    brighter = {**batch, 'inputs': [image // 2 for image in batch['inputs']]}
    assert slope_mm.calibrate(detector, [brighter]) == 0
    assert not tiny.differing(before, tiny.state_of(detector))


def test_never_again_on_resume(
    tiny_config: MakeConfig, slope_run: tiny.Run, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path, epochs=2, load_from=str(slope_run.checkpoint), resume=True, validate=False
    )
    probe = Probe()
    tiny.train(config, probe)
    assert len(probe.steps) == 2, 'the second epoch alone'
    assert not tiny.differing(probe.steps[0], tiny.steps_of(slope_run.model))
    assert 'calibrated the inputs' in tiny.read_log(slope_run.config.work_dir)
    assert 'calibrated the inputs' not in tiny.read_log(tmp_path)


def test_a_calibration_that_fails_leaves_nobody_watching(
    detector: nn.Module, config: Config
) -> None:
    batch = tiny.first_batch(config)

    def ending() -> Iterator[Any]:
        yield batch
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        slope_mm.calibrate(detector, ending())
    assert len(uncalibrated_layers(detector)) == 38
    # A layer that went on watching would neither calibrate itself nor quantize.
    layer = detector.rpn_head.rpn_conv
    layer(torch.randn(1, 16, 8, 8))
    assert layer.calibrated


def test_a_loader_with_a_batch_sampler_of_its_own() -> None:
    data = tiny.ToyImages()
    sampler = BatchSampler(SequentialSampler(data), 5, drop_last=False)
    loader = DataLoader(data, batch_sampler=sampler)
    batches = list(evenly_spread_batches(loader, 2))
    images = torch.cat([batch['image'] for batch in batches])
    # Ten of 64.
    wanted = torch.stack([data[int(6.4 * number)]['image'] for number in range(10)])
    assert torch.equal(images, wanted)


# --- what is not touched -------------------------------------------------------------------------


def test_training_order_and_random_states_do_not_change(
    tiny_config: MakeConfig, dense_run: tiny.Run, probed: Probe, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, load_from=str(dense_run.checkpoint), validate=False)
    plain = Probe()
    tiny.train(without(config, 'slope_mm.EpochSeedHook', OWN_HOOK), plain)
    assert plain.signs[0] != probed.signs[0], 'only one of them was calibrated by the hook'
    assert plain.images == probed.images
    assert plain.random_states[0] == probed.random_states[0]


def batch_norms(model: nn.Module) -> dict[str, Tensor]:
    state = tiny.state_of(model)
    return {k: v for k, v in state.items() if 'running_' in k or 'num_batches' in k}


def test_weights_batch_norm_and_random_states_are_left_as_found(
    detector: nn.Module, config: Config
) -> None:
    batch = tiny.first_batch(config)

    def drawn() -> Iterator[Any]:
        # As a pipeline's augmentations do.
        for _ in range(2):
            random.random(), np.random.rand(), torch.rand(1)
            yield batch

    before, states = tiny.state_of(detector), random_states()
    slope_mm.calibrate(detector, drawn())
    changed = tiny.differing(before, tiny.state_of(detector))
    assert {key.rsplit('.', 1)[1] for key in changed} == {'slope_act_step', 'slope_act_signed'}
    assert random_states() == states
    # A forward pass that is not a calibration moves both, so there was something to restore.
    with torch.no_grad():
        detector._run_forward(detector.data_preprocessor(batch, True), mode='loss')
    assert tiny.differing(before, tiny.state_of(detector)) != changed
    assert random_states() != states


class Normed(BaseModel):
    """A compressed layer behind an instance norm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(8, 8, 3)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss') -> Any:
        return {'loss': self.conv(self.norm(inputs)).mean()}


@pytest.mark.parametrize('run', [slope_mm.calibrate, run_losses])
def test_statistics_of_instance_norms_are_left_as_found(run: Callable[..., Any]) -> None:
    model = slope_mm.convert(Normed(), tiny.TOY_RECIPE)
    before = {key: value.clone() for key, value in model.norm.state_dict().items()}
    run(model, [dict(inputs=3 + torch.randn(2, 8, 6, 6))])
    for key, value in model.norm.state_dict().items():
        assert torch.equal(value, before[key]), key


class Counting(BaseModel):
    """Counts in buffers what it saw, as some losses do, in place and not; of samples with names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.register_buffer('in_place', torch.zeros(1))
        self.register_buffer('replaced', torch.zeros(1))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss') -> Any:
        self.in_place += 1
        self.replaced = self.replaced + 1
        assert data_samples is None or data_samples.weight > 0
        return {'loss': self.conv(inputs).mean()}


Sample = namedtuple('Sample', ['label', 'weight'])


@pytest.mark.parametrize('samples', [None, Sample(3, 0.5)])
def test_what_a_model_counts_is_left_as_found(samples: Any) -> None:
    model = slope_mm.convert(Counting(), tiny.TOY_RECIPE)
    kept = model.in_place, model.replaced
    slope_mm.calibrate(model, [dict(inputs=torch.randn(2, 8, 6, 6), data_samples=samples)])
    assert model.conv.calibrated
    assert (model.in_place, model.replaced) == kept == (0, 0)
    assert model.in_place is kept[0] and model.replaced is kept[1]


def test_samples_with_names_are_copied_as_they_are() -> None:
    batch = torch.zeros(2), [Sample([3], 0.5)]
    image, (sample,) = copied_samples(batch)
    assert image is batch[0]
    assert (
        type(sample) is Sample and sample == batch[1][0] and sample.label is not batch[1][0].label
    )


class Modes(Hook):
    """Mixes the modes before the calibration, and looks at them afterwards."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        runner.model.neck.eval()
        runner.model.backbone.layer1.eval()
        self.before = [module.training for module in runner.model.modules()]


class ModesAfter(tiny.Observer):
    def before_train(self, runner: Any) -> None:
        self.after = [module.training for module in runner.model.modules()]


def test_modes_are_restored(tiny_config: MakeConfig, dense_run: tiny.Run, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, load_from=str(dense_run.checkpoint), validate=False)
    runner = tiny.Runner.from_cfg(config)
    before, after = Modes(), ModesAfter()
    runner.register_hook(before)
    runner.register_hook(after)
    runner.train()
    assert before.before == after.after
    assert len(set(after.after)) == 2


# --- without the hook ----------------------------------------------------------------------------


def still(model: nn.Module) -> Any:
    """An optim wrapper that changes nothing."""
    return build_optim_wrapper(
        model,
        dict(
            constructor='slope_mm.SlopeOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.0),
            regularizer=dict(type='cosine'),
        ),
    )


def test_the_first_batch_calibrates_without_the_hook(
    detector: nn.Module, config: Config, dense_run: tiny.Run
) -> None:
    batch = tiny.first_batch(config)
    twin = tiny.build(config)
    twin.load_state_dict(dense_run.model.state_dict())
    torch.manual_seed(3)
    slope_mm.calibrate(twin.train(), [batch])

    entered: list[Any] = []
    detector.register_forward_pre_hook(lambda *_: entered.append(random_states()))
    counted = detector.backbone.bn1.num_batches_tracked.item()
    torch.manual_seed(3)
    at_first = random_states()
    detector.train_step(batch, still(detector))

    assert signs(detector) == signs(twin)
    assert not tiny.differing(tiny.steps_of(detector), tiny.steps_of(twin))
    # The training step itself saw untouched random states, and BN counted one batch.
    assert entered == [at_first]
    assert detector.backbone.bn1.num_batches_tracked.item() == counted + 1


@MODELS.register_module(force=True)
class WritingNet(BaseModel):
    """Counts labels up in the batch that it was given, and keeps those that it trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.labels = nn.Conv2d(8, 8, 1), []

    def forward(self, inputs: Tensor, data_samples: Any, mode: str = 'tensor') -> Any:
        for sample in data_samples:
            sample.labels += 1
        if torch.is_grad_enabled():
            self.labels += [sample.labels.tolist() for sample in data_samples]
        return {'loss': self.conv(inputs).mean()}


def test_what_calibrates_does_not_write_into_the_batch() -> None:
    init_default_scope('mmengine')
    model = MODELS.build(
        dict(type='slope_mm.SlopeModel', arch='WritingNet', recipe=tiny.TOY_RECIPE)
    )
    samples = [InstanceData(labels=torch.tensor([3, 5])), InstanceData(labels=torch.tensor([7]))]
    model.train().train_step(
        dict(inputs=torch.randn(2, 8, 4, 4), data_samples=samples), still(model)
    )
    assert not uncalibrated_layers(model)
    assert model.labels == [[4, 6], [8]]


def test_a_layer_without_input_waits_for_one(detector: nn.Module, config: Config) -> None:
    """No object, no positive RoI: the mask head sees nothing in the first batch."""
    batch = tiny.first_batch(config)
    empty = {**batch, 'data_samples': [sample.clone() for sample in batch['data_samples']]}
    for sample in empty['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    wrapper = still(detector)
    detector.train_step(empty, wrapper)
    waiting = [name for name, sign in signs(detector).items() if sign is None]
    assert waiting == list(uncalibrated_layers(detector))
    assert waiting
    assert all(name.startswith('roi_head.mask_head.') for name in waiting)
    detector.train_step(batch, wrapper)
    assert not uncalibrated_layers(detector)


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('first', [0, 1])
def test_an_average_of_what_is_calibrated_late_starts_there(
    tmp_path: Path, first: int, update_buffers: bool
) -> None:
    ema = dict(type='EMAHook', momentum=0.0002, update_buffers=update_buffers)
    config = tiny.toy_config(tmp_path, model__arch='BranchNet', train_cfg__max_iters=5)
    config.custom_hooks = [dict(type=OWN_HOOK, batches=1)]
    config.custom_hooks.insert(first, ema)
    run = tiny.train(config)
    average = next(hook.ema_model for hook in run.runner.hooks if hasattr(hook, 'ema_model'))
    own, averaged = run.model.branch, average.module.branch
    assert int(average.steps) == 5
    assert averaged.activation_signed is own.activation_signed is True
    step = float(own.slope_act_step)
    # Two updates of at most half a percent each lie between; the placeholder is 1.
    assert step < 0.9
    assert float(averaged.slope_act_step) == pytest.approx(step, rel=0.02)
    saved = torch.load(run.checkpoint, weights_only=False)['state_dict']
    assert int(saved['branch.slope_act_signed']) == 1


def test_an_average_starts_where_a_resumed_run_calibrates(tmp_path: Path) -> None:
    hooks = [dict(type='EMAHook', momentum=0.0002), dict(type=OWN_HOOK, batches=1)]
    options: Any = dict(model__arch='BranchNet', custom_hooks=hooks)
    first = tiny.train(tiny.toy_config(tmp_path, train_cfg__max_iters=2, **options))
    assert first.model.branch.activation_signed is None
    config = tiny.toy_config(tmp_path, train_cfg__max_iters=3, resume=True, **options)
    runner = Runner.from_cfg(config)
    # As after the second iteration: from now on the branch sees the whole batch.
    runner.model.seen = 3
    runner.train()
    assert 'calibrated the inputs of 1 layers' in tiny.read_log(tmp_path)
    average = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))
    step = float(runner.model.branch.slope_act_step)
    assert step < 0.9
    assert float(average.module.branch.slope_act_step) == pytest.approx(step, rel=0.02)


def test_evaluation_does_not_calibrate(detector: nn.Module, config: Config) -> None:
    before = tiny.state_of(detector)
    detector.eval().val_step(tiny.first_batch(config, split='val'))
    assert len(uncalibrated_layers(detector)) == 38
    assert not tiny.differing(before, tiny.state_of(detector))


@pytest.mark.parametrize('batches', [0, -1, 1.5, '4'])
def test_bad_number_of_batches(batches: Any) -> None:
    with pytest.raises(ConfigError, match='is not a number of batches >= 1'):
        SlopeCalibrationHook(batches=batches)


def test_an_evaluation_that_quantizes_no_input_says_so() -> None:
    recipe = dict(weight=dict(bits=4), activation=dict(bits=4))
    model = slope_mm.convert(nn.Sequential(nn.Conv2d(3, 16, 3)), recipe).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match='no range yet, and is not quantized'):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        # A dead branch says nothing about its range, and needs none.
        model(torch.zeros_like(x))
        model.train()(x)
        model.eval()(x)
