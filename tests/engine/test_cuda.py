"""Training on a GPU: fused kernels against plain passes, AMP, DDP, and no waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from wrapper_cases import gradients_at_step, wrapper_of

import slope_mm
from slope_mm.ops.fused import fused

pytestmark = pytest.mark.skipif(not tiny.HAS_CUDA, reason=tiny.NEEDS_CUDA)

RECIPE = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))


@pytest.fixture(autouse=True)
def same_sums_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may add up in another order, and what lies on an edge falls to another level."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


class Net(nn.Module):
    """Two branches, of which one may stay unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 3, padding=1))
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.branches = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        slope_mm.convert(self, RECIPE)
        self.cuda().train()

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        features = self.up(self.body(self.stem(x))).mean((2, 3))
        used = self.branches if both else self.branches[:1]
        return torch.cat([branch(features) for branch in used], 1)


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).cuda()


def train(model: nn.Module, wrapper: OptimWrapper, x: Tensor, both: bool = True) -> Tensor:
    with wrapper.optim_context(model):
        # Calibrates itself on its first input.
        loss = model(x, both).float().square().mean()
    wrapper.update_params(loss)
    return loss.detach()


@pytest.mark.parametrize('both', [True, False])
def test_fused_kernels_train_as_plain_passes_do(both: bool) -> None:
    losses, first = [], []
    for enabled in (False, True):
        net = Net()
        wrapper = wrapper_of(net)
        found = gradients_at_step(wrapper, net)
        with fused(enabled):
            losses.append([float(train(net, wrapper, images(0), both))])
            first.append(dict(found))
            losses[-1] += [float(train(net, wrapper, images(i), both)) for i in (1, 2, 3)]
    assert losses[0][0] != losses[0][-1]
    # Sums have another order, and what lies on the edge of a level falls to the other side.
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert first[0].keys() == first[1].keys()
    assert any('branches.1' in name for name in first[0]) == both
    for name, gradient in first[0].items():
        torch.testing.assert_close(first[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_steady_step_never_waits_for_the_device() -> None:
    for enabled in (False, True):
        net, x = Net(), images(0)
        wrapper = wrapper_of(net)
        with fused(enabled):
            for _ in range(2):
                train(net, wrapper, x)
            torch.cuda.set_sync_debug_mode('error')
            try:
                train(net, wrapper, x)
            finally:
                torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('enabled', [False, True])
def test_amp_follows_full_precision(dtype: str, enabled: bool) -> None:
    with fused(enabled):
        net = Net()
        wrapper = wrapper_of(net)
        full = [float(train(net, wrapper, images(i))) for i in (0, 1)]
        net = Net()
        wrapper = wrapper_of(net, type='SlopeAmpOptimWrapper', dtype=dtype)
        losses = [float(train(net, wrapper, images(i))) for i in (0, 1)]
    torch.testing.assert_close(losses, full, rtol=0.05, atol=0)
    assert losses != full
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        'nccl', init_method=f'file://{folder}/store', rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('enabled', [False, True])
@pytest.mark.parametrize('both', [True, False])
def test_ddp_with_and_without_unused_parameters(tmp_path: Path, both: bool, enabled: bool) -> None:
    """The same gradients as without DDP, and none where a branch did not run."""
    with fused(enabled):
        net = Net()
        wrapper = wrapper_of(net)
        expected = gradients_at_step(wrapper, net)
        for i in range(2):
            train(net, wrapper, images(i), both)
        with one_process(tmp_path):
            net = Net()
            parallel = DistributedDataParallel(net, find_unused_parameters=not both)
            wrapper = wrapper_of(net)
            found = gradients_at_step(wrapper, net)
            for i in range(2):
                train(parallel, wrapper, images(i), both)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
