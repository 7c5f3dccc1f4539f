"""Ways of training a detector, each through the Runner on the shapes set; docs/training.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from torch import Tensor, nn

import slope_mm
from slope_mm import ConfigError, SlopeError, bake, compressed_layers
from slope_mm.engine import launch
from slope_mm.engine.refusals import BACKEND_PACKAGES, check_backends, check_wrapped
from slope_mm.ops.fused import fused, fused_enabled

MakeConfig = Callable[..., Config]


class Watch(tiny.Observer):
    """Keeps the parameters around every iteration, and the gradients that the optimizer used."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def before_train(self, runner: Any) -> None:
        self.states.append(parameters(runner.model))
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append(
                {n: p.grad.clone() for n, p in runner.model.named_parameters() if p.requires_grad}
            )
        )

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self.states.append(parameters(runner.model))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope='module')
def make(
    tiny_config: MakeConfig, dense_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory
) -> MakeConfig:
    """A fine-tuning of two iterations from the dense run, without validation."""

    def config(**options: Any) -> Config:
        work_dir = tmp_path_factory.mktemp('way')
        start = str(dense_run.checkpoint)
        return tiny_config(work_dir, validate=False, load_from=start, **options)

    return config


@pytest.fixture(scope='module')
def plain(make: MakeConfig) -> tuple[tiny.Run, Watch]:
    watch = Watch()
    return tiny.train(make(), watch), watch


def losses(run: tiny.Run) -> list[float]:
    return [row['loss'] for row in tiny.read_losses(run.config.work_dir)]


@pytest.mark.parametrize(
    'options',
    [
        dict(model__backbone__with_cp=True),
        # The Runner's own key; it makes a part's forward one that is computed twice.
        dict(activation_checkpointing=['backbone.layer1', 'backbone.layer3']),
    ],
    ids=['with_cp', 'runner'],
)
def test_activation_checkpointing_trains_alike(
    make: MakeConfig, plain: tuple[tiny.Run, Watch], options: dict[str, Any]
) -> None:
    run = tiny.train(make(**options))
    assert losses(run) == pytest.approx(losses(plain[0]), rel=1e-5)
    wanted = parameters(plain[0].model)
    for name, value in parameters(run.model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_clipping_bounds_the_gradient_with_the_regularizers_share(
    make: MakeConfig, plain: tuple[tiny.Run, Watch]
) -> None:
    def norm(gradients: dict[str, Tensor]) -> float:
        return float(torch.stack([g.norm() for g in gradients.values()]).norm())

    watch = Watch()
    tiny.train(make(optim_wrapper__clip_grad=dict(max_norm=0.5)), watch)
    unclipped, clipped = plain[1].gradients[0], watch.gradients[0]
    assert norm(unclipped) > 1
    assert norm(clipped) == pytest.approx(0.5, rel=1e-4)
    factor = 0.5 / norm(unclipped)
    assert any('slope_step' in name for name in clipped)
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, factor * unclipped[name], rtol=1e-4, atol=1e-8)


def test_accumulation_updates_once(make: MakeConfig, plain: tuple[tiny.Run, Watch]) -> None:
    watch = Watch()
    tiny.train(make(optim_wrapper__accumulative_counts=2), watch)
    start, first, second = watch.states
    assert not tiny.differing(start, first)
    moved = tiny.differing(first, second)
    assert 'backbone.layer3.0.conv1.weight' in moved
    assert 'backbone.layer3.0.conv1.slope_step' in moved
    assert len(watch.gradients) == 1


def test_frozen_stages_stay_as_they_are(make: MakeConfig) -> None:
    watch = Watch()
    run = tiny.train(make(model__backbone__frozen_stages=2), watch)
    moved = tiny.differing(watch.states[0], watch.states[-1])
    frozen = ('backbone.conv1', 'backbone.bn1', 'backbone.layer1', 'backbone.layer2')
    assert not [name for name in moved if name.startswith(frozen)]
    steps = [n for n in moved if n.endswith('slope_step')]
    layers = compressed_layers(run.model)
    assert len(steps) == sum(not name.startswith(frozen) for name in layers)


def test_iterations_instead_of_epochs_and_a_scaled_learning_rate(make: MakeConfig) -> None:
    config = make()
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=10)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    config.log_processor.by_epoch = False
    config.param_scheduler = []
    schedule = next(h for h in config.custom_hooks if h.type == 'slope_mm.SlopeScheduleHook')
    schedule.update(warmup=2, freeze_at=2)
    launch.use_auto_scale_lr(config)
    run = tiny.train(config)
    rows = tiny.read_losses(config.work_dir)
    assert [row['step'] for row in rows] == [1, 2, 3]
    # Lambda rises over two iterations; the masks are held from the third on.
    assert rows[0]['slope_loss'] == pytest.approx(rows[1]['slope_loss'] / 2, rel=0.05)
    masks = [layer.slope_mask for layer in compressed_layers(run.model).values()]
    assert sum(mask is not None for mask in masks) > 30
    # Four images a step instead of eight: half the learning rate, for the steps' group too.
    assert [g['lr'] for g in run.runner.optim_wrapper.param_groups] == [2.5e-4, 2.5e-4]
    assert (Path(config.work_dir) / 'iter_2.pth').exists()


# --- mixed precision -----------------------------------------------------------------------------


class Types(tiny.Observer):
    """What the neck's layers give while the model trains."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        conv = runner.model.neck.fpn_convs[0].conv
        conv.register_forward_hook(lambda module, inputs, output: self.seen.add(output.dtype))


def test_amp_trains_in_bf16_on_the_cpu(make: MakeConfig, plain: tuple[tiny.Run, Watch]) -> None:
    """mmengine's own wrapper asserts a GPU; NMS and RoIAlign of mmcv stop at bf16."""
    config, types, watch = make(), Types(), Watch()
    launch.use_amp(config)
    run = tiny.train(config, types, watch)
    assert types.seen == {torch.bfloat16}
    assert type(run.runner.optim_wrapper).__name__ == 'SlopeAmpOptimWrapper'
    first, wanted = (tiny.read_losses(r.config.work_dir)[0] for r in (run, plain[0]))
    assert first['slope_loss'] == pytest.approx(wanted['slope_loss'], rel=1e-4)
    # Proposals are sampled anew where scores differ in the last digits.
    assert first['loss'] == pytest.approx(wanted['loss'], rel=0.05)
    assert first['loss'] != wanted['loss']
    for name, gradient in watch.gradients[0].items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    # An enabled loss scaler would refuse the empty state of a disabled one.
    assert 'loss_scaler' not in run.runner.optim_wrapper.state_dict()


def test_amp_of_a_dense_model_on_the_cpu(make: MakeConfig) -> None:
    config = make()
    config.model.type = config.model.pop('arch')
    del config.model['recipe']
    config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    config.custom_hooks, types = [], Types()
    launch.use_amp(config)
    run = tiny.train(config, types)
    assert types.seen == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(losses(run))))


def test_fp16_on_the_cpu_is_refused(make: MakeConfig) -> None:
    config = make(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__dtype='float16')
    with pytest.raises(ConfigError, match='mixed precision on the CPU is bfloat16'):
        tiny.train(config)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.skipif(tiny.TORCH < (2, 2), reason="torch 2.1's compiler cannot trace the step")
@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_a_compiled_train_step_trains_alike(backend: str, tmp_path: Path) -> None:
    """The stock parts are compiled, what is SLOPE's is left out."""
    wanted = tiny.train(tiny.toy_config(tmp_path / 'plain'))
    found = tiny.train(tiny.toy_config(tmp_path / 'compiled', compile=dict(backend=backend)))
    assert 'compiled' in tiny.read_log(tmp_path / 'compiled')
    from torch._dynamo.utils import counters

    assert counters['stats']['unique_graphs'] > 0
    state = tiny.state_of(found.model)
    for name, value in tiny.state_of(wanted.model).items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(tiny.TORCH < (2, 2), reason="torch 2.1's compiler cannot trace the step")
def test_a_compiled_model_may_have_both_orders_of_axes(tmp_path: Path) -> None:
    """A transposed convolution behind another one, as in mask heads: axes become symbols."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2))
    model = slope_mm.convert(stock, dict(weight=dict(sparsity='2:4', bits=4))).train()
    x = torch.randn(2, 4, 9, 9)
    wanted = model(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend='eager')(x), wanted)


def test_fused_passes_train_alike(tmp_path: Path) -> None:
    """``optim_wrapper.compile``: the compression itself through compiled kernels."""
    wanted = tiny.train(tiny.toy_config(tmp_path / 'plain'))
    config = tiny.toy_config(tmp_path / 'fused')
    config.optim_wrapper.compile = True
    with fused(False):
        found = tiny.train(config)
        assert fused_enabled(torch.zeros(1))
    state = tiny.state_of(found.model)
    for name, value in tiny.state_of(wanted.model).items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


# --- synchronized batch norms --------------------------------------------------------------------


def test_sync_bn_conversion_leaves_the_compression(slope_run: tiny.Run) -> None:
    """As the Runner does it for ``sync_bn='torch'``, in processes with GPUs."""
    model = tiny.build(slope_run.config)
    before, state = list(compressed_layers(model)), tiny.state_of(model)
    synced = convert_sync_batchnorm(model, 'torch')
    norms = [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) > 20
    assert list(compressed_layers(synced)) == before
    assert not tiny.differing(state, tiny.state_of(synced))
    # A checkpoint goes both ways, and so does what is made of one.
    synced.load_state_dict(slope_run.model.state_dict())
    wanted = tiny.state_of(bake(slope_run.model))
    assert not tiny.differing(wanted, tiny.state_of(bake(synced)))


def test_sync_bn_without_gpus_is_refused(make: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"sync_bn='torch'.*need GPUs"):
        launch.check_before_training(make(sync_bn='torch', launcher='pytorch'))


# --- what cannot be ------------------------------------------------------------------------------


def test_efficient_conv_bn_eval_is_refused(make: MakeConfig) -> None:
    config = make(efficient_conv_bn_eval=['backbone'])
    with pytest.raises(ConfigError, match=r'efficient_conv_bn_eval.*remove it from the config'):
        launch.check_before_training(config)
    # Without our tools, before the first iteration.
    watch = Watch()
    with pytest.raises(SlopeError, match=r'torch.fx cannot trace it.*remove it from the config'):
        tiny.train(config, watch)
    assert not watch.states


@pytest.mark.parametrize(
    'options',
    [
        dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
        dict(strategy=dict(type='FSDPStrategy')),
        dict(strategy=dict(type='DeepSpeedStrategy')),
    ],
    ids=lambda options: next(iter(options.values()))['type'],
)
def test_sharded_training_is_refused(make: MakeConfig, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'cannot be trained under .*MMDistributedDataParallel'):
        launch.check_before_training(make(**options))


def test_a_sharded_model_is_refused_without_our_tools() -> None:
    """torch shards on accelerators alone, so this asks with a class of that name."""

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ConfigError, match='cannot be trained under FullyShardedDataParallel'):
        check_wrapped(FullyShardedDataParallel())
    check_wrapped(nn.Linear(2, 2))


@pytest.mark.parametrize('kind', BACKEND_PACKAGES)
def test_a_backend_without_its_package_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), dict(type=kind)])
    monkeypatch.setitem(BACKEND_PACKAGES, kind, 'slope_mm_no_such_package')
    with pytest.raises(ConfigError, match=f"{kind} needs the package 'slope_mm_no_such_package'"):
        check_backends(visualizer)
    monkeypatch.setitem(BACKEND_PACKAGES, kind, 'torch')
    check_backends(visualizer)


def test_tensorboard_gets_the_monitors_values(make: MakeConfig) -> None:
    pytest.importorskip('tensorboard', reason='the TensorBoard backend needs tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make()
    config.visualizer.vis_backends = [
        dict(type='LocalVisBackend'),
        dict(type='TensorboardVisBackend'),
    ]
    launch.check_before_training(config)
    tiny.train(config)
    folder = next(Path(config.work_dir).glob('*/vis_data/events*')).parent
    events = EventAccumulator(str(folder)).Reload()
    rows = tiny.read_losses(config.work_dir)
    for key in ('loss', 'slope_loss', 'slope_cosine_mean'):
        found = [event.value for event in events.Scalars(key)]
        assert found == pytest.approx([row[key] for row in rows], rel=1e-6)
