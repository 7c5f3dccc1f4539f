"""NaN and infinity: the iteration and the place are named, training stops or passes over them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS
from mmengine.structures import InstanceData
from torch import Tensor

import slope_mm
from slope_mm import ConfigError, TensorError
from slope_mm.engine import SlopeFiniteHook
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.finite import check_state_finite, listed, nonfinite, nonfinite_data
from slope_mm.engine.optim_wrapper import RegularizedOptimWrapper

NAN, INF = float('nan'), float('inf')


@MODELS.register_module(force=True)
class SteepNet(tiny.ToyNet):
    """A large loss comes out as zero, with an infinite gradient."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if isinstance(out, dict) and out['loss'] > 1e6:
            out['loss'] = (out['loss'] - out['loss'].detach()).sqrt()
        return out


def config_of(work_dir: Path, spoilt: tuple[int, ...] = (), **options: Any) -> Config:
    """Toy runs of four images an iteration; ``hook__…`` are the hook's arguments."""
    hook = {k.removeprefix('hook__'): options.pop(k) for k in list(options) if k[:4] == 'hook'}
    data = {k.removeprefix('data__'): options.pop(k) for k in list(options) if k[:4] == 'data'}
    config = tiny.toy_config(work_dir, **{'train_cfg__max_iters': 4, **options})
    config.train_dataloader.dataset = dict(type='SpoiltImages', spoilt=spoilt, **data)
    config.custom_hooks = [dict(type='slope_mm.SlopeFiniteHook', **hook)]
    config.optim_wrapper.optimizer = dict(type='Adam', lr=0.01, weight_decay=0.1)
    config.default_hooks.checkpoint.interval = 1
    return config


class States(tiny.Observer):
    """Model and optimizer after each iteration."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
        state = tiny.state_of(runner.model)
        for number, slots in runner.optim_wrapper.optimizer.state_dict()['state'].items():
            state |= {f'{number}.{name}': torch.as_tensor(v).clone() for name, v in slots.items()}
        self.states.append(state)


class Spoil(tiny.Observer):
    """Puts a value where it is told to, before an iteration."""

    priority = 'VERY_HIGH'

    def __init__(self, iteration: int, spoil: Callable[[Any], Any]) -> None:
        self.iteration, self.spoil = iteration, spoil

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            self.spoil(runner)


def is_finite(state: dict[str, Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in state.values() if v.is_floating_point())


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob('*.pth')}


# --- stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (dict(), r'the batch holds NaN or infinity in image\[2\]'),
        (dict(data__value=INF), r'the batch holds NaN or infinity in image\[2\]'),
        (dict(data__key='target'), r'the batch holds NaN or infinity in target\[2\]'),
        # Finite, but not its square.
        (
            dict(data__key='target', data__value=1e30),
            r'the loss is inf: all .* finite, loss is not',
        ),
    ],
)
def test_the_iteration_and_the_batch_are_named(
    data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TensorError, match=rf'^iteration 3 \(epoch 1\): {message}'):
        tiny.train(config_of(tmp_path, (10,), **data))
    assert checkpoints(tmp_path) == {'iter_1.pth', 'iter_2.pth'}
    for path in tmp_path.glob('*.pth'):
        assert is_finite(load_checkpoint_file(path)['state_dict'])


def test_the_layer_that_makes_it_is_named(tmp_path: Path) -> None:
    """A bias is no weight that a mask would refuse."""

    class Overflow(tiny.Observer):
        priority = 'VERY_HIGH'

        def before_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            if runner.iter == 1:
                handle = runner.model.twice.register_forward_hook(lambda m, i, o: o / 0)
                runner.model.handle = handle

    with pytest.raises(
        TensorError,
        match=r'iteration 2 .* the loss is nan: NaN or infinity begins in the output of twice,'
        ' whose input is finite',
    ):
        tiny.train(config_of(tmp_path, hook__activation_interval=0), Overflow())


def test_an_infinite_input_that_a_quantizer_clips_is_found(tmp_path: Path) -> None:
    """No loss betrays it."""

    def overflow(runner: Any) -> None:
        runner.model.norm.register_forward_hook(
            lambda m, i, o: o.index_fill(0, torch.tensor(0), INF)
        )

    with pytest.raises(TensorError, match=r'iteration 2 .*: NaN or infinity in the output of norm'):
        tiny.train(config_of(tmp_path / 'a', hook__activation_interval=1), Spoil(1, overflow))
    tiny.train(config_of(tmp_path / 'b', hook__activation_interval=0), Spoil(1, overflow))


@pytest.mark.parametrize('action', ['stop', 'skip'])
@pytest.mark.parametrize('name', ['first.weight', 'mix.bias', 'twice.slope_step'])
def test_a_parameter_is_named_and_never_skipped(name: str, action: str, tmp_path: Path) -> None:
    def after(runner: Any) -> None:
        runner.model.state_dict()[name].view(-1)[0] = INF

    class After(tiny.Observer):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            if runner.iter == 1:
                after(runner)

    with pytest.raises(TensorError, match=rf'after iteration 2, {name} is NaN or infinite'):
        tiny.train(config_of(tmp_path / 'a', hook__action=action), After())
    assert checkpoints(tmp_path / 'a') == {'iter_1.pth'}

    class Before(tiny.Observer):
        priority = 'VERY_HIGH'

        def before_train(self, runner: Any) -> None:
            after(runner)

    with pytest.raises(TensorError, match=rf'before the first iteration, {name} is NaN'):
        tiny.train(config_of(tmp_path / 'b', hook__action=action), Before())


def test_a_checkpoint_with_nan_is_not_started_from(tmp_path: Path) -> None:
    run = tiny.train(config_of(tmp_path / 'a'))
    content = load_checkpoint_file(run.checkpoint)
    content['state_dict']['mix.weight'][0, 0] = NAN
    torch.save(content, tmp_path / 'spoilt.pth')
    with pytest.raises(TensorError, match='the checkpoint holds NaN or infinity in mix.weight'):
        tiny.train(config_of(tmp_path / 'b', load_from=str(tmp_path / 'spoilt.pth')))


def test_a_stock_optim_wrapper_can_only_stop(tmp_path: Path) -> None:
    def dense(action: str) -> Config:
        config = config_of(tmp_path / action, (10,), data__key='target', hook__action=action)
        config.model = dict(type='ToyNet')
        config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
        return config

    with pytest.raises(TensorError, match=r'iteration 3 .* in target\[2\]'):
        tiny.train(dense('stop'))
    assert checkpoints(tmp_path / 'stop') == {'iter_1.pth', 'iter_2.pth'}
    with pytest.raises(ConfigError, match="action='skip'.*needs an optim wrapper"):
        tiny.train(dense('skip'))


def test_arguments() -> None:
    for given in (dict(action='ignore'), dict(max_skips=0), dict(activation_interval=-1)):
        with pytest.raises(ConfigError, match=f'SlopeFiniteHook {next(iter(given))}='):
            SlopeFiniteHook(**given)


# --- skip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'data',
    [dict(), dict(data__key='target'), dict(data__key='target', data__value=1e8)],
    ids=['image', 'target', 'gradient'],
)
def test_a_skipped_iteration_changes_nothing(data: dict[str, Any], tmp_path: Path) -> None:
    """Statistics that the forward pass has moved come back; the next iteration trains."""
    seen = States()
    spoilt = config_of(tmp_path / 'a', (5,), hook__action='skip', model__norm_eval=False, **data)
    spoilt.model.arch = 'SteepNet'
    run = tiny.train(spoilt, seen)
    hook = next(h for h in run.runner.hooks if isinstance(h, SlopeFiniteHook))
    assert hook.skipped == 1
    assert not tiny.differing(seen.states[0], seen.states[1])
    moved = tiny.differing(seen.states[1], seen.states[2])
    assert {'first.weight', 'mix.slope_step', 'norm.running_mean', '0.exp_avg'} <= set(moved)
    assert all(
        bool(v.isfinite().all()) for s in seen.states for v in s.values() if v.is_floating_point()
    )
    assert 'SLOPE skips iteration 2 (epoch 1)' in tiny.read_log(tmp_path / 'a')
    assert len(checkpoints(tmp_path / 'a')) == 4


def test_skipping_equals_a_run_without_the_batch(tmp_path: Path) -> None:
    """Random states included: SGD on batches 1, 3, 4 ends where skipping batch 2 ends."""

    @DATASETS.register_module(force=True)
    class WithoutSecond(tiny.ToyImages):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return super().__getitem__(index if index < 4 else index + 4)

    def run(folder: str, dataset: dict[str, Any], iterations: int) -> dict[str, Tensor]:
        config = config_of(tmp_path / folder, hook__action='skip')
        config.train_dataloader.dataset = dataset
        config.train_cfg.max_iters = iterations
        return tiny.state_of(tiny.train(config).model)

    skipped = run('a', dict(type='SpoiltImages', spoilt=(6,)), 4)
    without = run('b', dict(type='WithoutSecond'), 3)
    assert not tiny.differing(skipped, without)


@pytest.mark.parametrize('bad', [4, 8], ids=['first of two', 'last of two'])
def test_an_accumulated_update_is_dropped_as_a_whole(bad: int, tmp_path: Path) -> None:
    seen = States()
    config = config_of(tmp_path, (bad,), hook__action='skip', train_cfg__max_iters=6)
    config.train_dataloader.batch_size = 2
    config.optim_wrapper.accumulative_counts = 2
    tiny.train(config, seen)
    # Images 4 to 7 are iterations 3 and 4, images 8 to 11 iterations 5 and 6.
    assert tiny.differing(seen.states[0], seen.states[1])
    updates = [bool(tiny.differing(seen.states[i - 1], seen.states[i])) for i in (3, 5)]
    assert updates == ([False, True] if bad == 4 else [True, False])
    for iteration in (2, 4):
        assert not tiny.differing(seen.states[iteration - 1], seen.states[iteration])


def test_of_a_dropped_update_nothing_is_left_for_the_next(tmp_path: Path) -> None:
    """Whichever of its two iterations was bad."""
    ends = []
    for bad in (4, 6):
        seen = States()
        config = config_of(tmp_path / str(bad), (bad,), hook__action='skip')
        config.train_dataloader.batch_size, config.train_cfg.max_iters = 2, 6
        config.optim_wrapper.accumulative_counts = 2
        tiny.train(config, seen)
        assert not tiny.differing(seen.states[1], seen.states[3])
        assert tiny.differing(seen.states[3], seen.states[5])
        ends.append(seen.states[5])
    assert not tiny.differing(*ends)


class NanGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * NAN


@MODELS.register_module(force=True)
class NanGradientNet(tiny.ToyNet):
    """A fine loss whose gradient never is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if isinstance(out, dict):
            out['loss'] = NanGradients.apply(out['loss'])
        return out


@pytest.mark.parametrize('way', ['gradients', 'halves'])
def test_a_training_that_never_updates_ends_though_losses_are_fine(
    way: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, hook__action='skip', hook__max_skips=2, train_cfg__max_iters=16)
    if way == 'gradients':
        config.model.arch = 'NanGradientNet'
    else:
        # One of the two iterations of each update.
        config.train_dataloader.dataset.spoilt = tuple(range(4, 64, 8))
        config.optim_wrapper.accumulative_counts = 2
    with pytest.raises(TensorError, match='2 iterations were skipped already without an update'):
        tiny.train(config)


def test_so_many_in_a_row_end_the_training(tmp_path: Path) -> None:
    spoilt = (5, 9, 13)
    with pytest.raises(TensorError, match='iteration 4 .* 2 iterations were skipped'):
        tiny.train(config_of(tmp_path / 'a', spoilt, hook__action='skip', hook__max_skips=2))
    tiny.train(config_of(tmp_path / 'b', spoilt, hook__action='skip', hook__max_skips=3))


def test_skips_with_updates_between_them_never_end_the_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, (1, 9, 17), hook__action='skip', hook__max_skips=1)
    config.train_cfg.max_iters = 6
    run = tiny.train(config)
    hook = next(hook for hook in run.runner.hooks if isinstance(hook, SlopeFiniteHook))
    assert run.runner.iter == 6
    assert hook.skipped == 3


@pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='needs torch 2.3, whose loss scaler knows CPUs'
)
def test_the_loss_scaler_keeps_its_gradients(tmp_path: Path) -> None:
    """Infinite gradients lower the scale as without the hook; a loss that is NaN does not."""

    class Scaled(OptimWrapper):
        """mmengine's AMP wrapper, on a CPU."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**20)

        def backward(self, loss: Tensor, **kwargs: Any) -> None:
            self.loss_scaler.scale(loss).backward(**kwargs)
            self._inner_count += 1

        def step(self, **kwargs: Any) -> None:
            self.loss_scaler.step(self.optimizer, **kwargs)
            self.loss_scaler.update()

    class Wrapper(RegularizedOptimWrapper, Scaled):
        pass

    class Admits:
        """The hook's answers."""

        def __init__(self) -> None:
            self.asked = 0

        def admits_loss(self, loss: Tensor) -> bool:
            return bool(loss.isfinite())

        def admits_gradients(self) -> bool:
            self.asked += 1
            return True

        def updated(self) -> None:
            pass

    torch.manual_seed(0)
    model = slope_mm.convert(torch.nn.Linear(8, 8), dict(weight=dict(sparsity='2:4', bits=4)))
    wrapper = Wrapper(
        optimizer=torch.optim.Adam(model.parameters(), lr=0.1), regularizer=dict(type='none')
    )
    wrapper.guard = Admits()
    before = tiny.state_of(model)
    scales = []
    for factor in (1e35, NAN, 1.0):
        with wrapper.optim_context(model):
            loss = model(torch.ones(2, 8)).square().mean() * factor
        wrapper.update_params(loss)
        scales.append(wrapper.loss_scaler.get_scale())
        if factor != 1:
            assert not tiny.differing(tiny.state_of(model), before)
    # Halved by the overflow, untouched by the loss that was dropped, then a good step.
    assert scales == [2.0**19] * 3
    assert 'weight' in tiny.differing(tiny.state_of(model), before)
    assert wrapper.guard.asked == 0


def test_a_detector_passes_over_a_batch_with_nan(
    tiny_config: Callable[..., Config], dense_run: tiny.Run, tmp_path: Path
) -> None:
    """Through the heads, their samplers and NMS; the file is named."""

    class SpoilImage(tiny.Observer):
        priority = 'VERY_HIGH'

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if runner.iter == 0:
                image = data_batch['inputs'][1].float()
                image[0, 5, 5] = NAN
                data_batch['inputs'][1] = image
                self.file = data_batch['data_samples'][1].img_path

    config = tiny_config(tmp_path, validate=False, load_from=str(dense_run.checkpoint))
    hook = next(h for h in config.custom_hooks if h.type == 'slope_mm.SlopeFiniteHook')
    hook.action = 'skip'
    spoil, seen = SpoilImage(), States()
    run = tiny.train(config, spoil, seen)
    log = tiny.read_log(tmp_path)
    assert (
        f'SLOPE skips iteration 1 (epoch 1): the batch holds NaN or infinity in'
        f' inputs[1] ({spoil.file})' in log
    )
    assert is_finite(tiny.state_of(run.model))
    # Statistics are frozen, so the skipped iteration ends with the weights that were loaded.
    wanted = load_checkpoint_file(dense_run.checkpoint)['state_dict']
    assert not [key for key in wanted if not torch.equal(seen.states[0][key], wanted[key])]
    assert tiny.differing(seen.states[0], seen.states[1])


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_no_range_is_learned_from_nan(value: float) -> None:
    """A later, finite input calibrates; sampled or not, the value counts."""
    recipe = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))
    model = slope_mm.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), recipe).train()
    layer = slope_mm.compressed_layers(model)['0']
    x = torch.randn(999, 64)
    spoilt = x.clone()
    spoilt[501, 7] = value
    model(spoilt)
    assert not layer.calibrated
    model(x)
    assert layer.calibrated
    assert float(layer.slope_act_step.detach()) > 0


# --- what is looked at ---------------------------------------------------------------------------


def test_sums_that_overflow_are_no_infinity() -> None:
    named = [('large', torch.full((8,), 3e38)), ('none', None), ('empty', torch.zeros(0))]
    assert nonfinite(named) == []
    named += [('infinite', torch.tensor([0.0, INF])), ('both', torch.tensor([INF, -INF]))]
    assert nonfinite(named) == ['infinite', 'both']


def test_a_list_names_three_and_counts_the_rest() -> None:
    assert listed(list('abc')) == 'a, b, c'
    assert listed(list('abcde')) == 'a, b, c and 2 more'


def test_a_wrapped_models_state_is_looked_at() -> None:
    model = torch.nn.Linear(2, 2)
    state = {f'module.{name}': value.clone() for name, value in model.state_dict().items()}
    check_state_finite(model, state, 'it', '')
    state['module.bias'][1] = NAN
    with pytest.raises(TensorError, match='it holds NaN or infinity in bias;'):
        check_state_finite(model, state, 'it', '')


def test_boxes_of_data_samples_are_looked_at() -> None:
    sample = DetDataSample(metainfo=dict(img_path='a.jpg'))
    sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(2, 4)))
    batch = dict(inputs=[torch.zeros(3, 2, 2)], data_samples=[sample])
    assert nonfinite_data(batch) is None
    sample.gt_instances.bboxes.tensor[1, 2] = INF
    message = r'data_samples\[0\]\.gt_instances\.bboxes \(a\.jpg\)'
    assert re.search(message, nonfinite_data(batch))
