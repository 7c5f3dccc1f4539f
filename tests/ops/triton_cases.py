"""The Triton kernels against the plain passes on random input.

Run by ``test_triton_pass.py`` in a process that interprets them; on a GPU by
``python -m pytest --noconftest tests/ops/triton_cases.py``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slope_mm.convert import compressed_layers, convert
from slope_mm.engine.optim_wrapper import SlopeOptimWrapper
from slope_mm.ops import (
    NMPattern,
    activation_codes,
    compress_many,
    compress_with_powers,
    lsq_quantize,
    mse_init_step,
    weight_codes,
)
from slope_mm.ops.fused import TRITON_GRADIENTS, activation_kernels, fused, weight_kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight_results(
    w: Tensor, name: str, bits: int, groups: tuple[int, int], mask: Tensor | None, gradient: str
) -> list[Tensor]:
    """Ŵ, sums and both gradients of a weight whose output channels are on axis 0."""
    codes, pattern = weight_codes(name, bits), None if mask is not None else NMPattern(*groups)
    latent = w.clone().requires_grad_()
    step = mse_init_step(w.float(), codes, 0, mask).requires_grad_()
    compressed, powers = compress_with_powers(
        latent, step, codes, pattern=pattern, mask=mask, gradient=gradient, decay=0.1
    )
    upstream, by_power = normal(*w.shape, seed=1).to(w.dtype), normal(*powers.shape, seed=8)
    torch.autograd.backward([compressed, powers], [upstream, by_power])
    assert latent.grad is not None and step.grad is not None
    return [compressed.detach(), powers.detach(), latent.grad, step.grad]


def assert_same(plain: list[Tensor], found: list[Tensor], tolerance: float) -> None:
    if plain[0].dtype == torch.bfloat16:
        # The interpreter cuts bfloat16's digits off where devices round.
        torch.testing.assert_close(found[0], plain[0], rtol=2**-7, atol=0)
    else:
        assert torch.equal(plain[0], found[0])
    for expected, other in zip(plain[1:], found[1:], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(other, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 4), (4, 8), (2, 16), (2, 3), (3, 4)])
@pytest.mark.parametrize('kernel', [(), (3, 3), (1, 1)])
def test_same_patterns_with_ties(n: int, m: int, kernel: tuple[int, ...]) -> None:
    w = normal(6, 3 * m, *kernel, seed=0)
    # Few magnitudes, so that groups tie; a channel of zeros; the last tile is not full.
    w = w.mul(4).round().div(4)
    w[3] = 0
    plain = weight_results(w, 'lsq', 4, (n, m), None, 'ste')
    with fused():
        assert weight_kernels(w, weight_codes('lsq', 4), None, None, 'ste') is not None
        assert_same(plain, weight_results(w, 'lsq', 4, (n, m), None, 'ste'), 1e-5)


@pytest.mark.parametrize('gradient', TRITON_GRADIENTS)
@pytest.mark.parametrize(('name', 'bits'), [('lsq', 2), ('odd', 2), ('symmetric', 3), ('lsq', 8)])
def test_same_code_sets_and_gradients(name: str, bits: int, gradient: str) -> None:
    w = normal(5, 8, 3, 3, seed=2)
    frozen = normal(*w.shape, seed=3) > 0
    for mask in (None, frozen):
        plain = weight_results(w, name, bits, (2, 4), mask, gradient)
        with fused():
            assert_same(plain, weight_results(w, name, bits, (2, 4), mask, gradient), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_same_in_low_precision(dtype: torch.dtype) -> None:
    w = normal(4, 16, 3, 3, seed=4).to(dtype)
    plain = weight_results(w, 'lsq', 4, (2, 4), None, 'ste')
    with fused():
        assert_same(plain, weight_results(w, 'lsq', 4, (2, 4), None, 'ste'), 1e-2)


def test_same_without_quantization_and_with_one_gradient_alone() -> None:
    w = normal(4, 8, seed=5)
    step = mse_init_step(w, weight_codes('lsq', 4))
    for codes, use in itertools.product((None, weight_codes('lsq', 4)), (0, 1)):
        found = []
        for enabled in (False, True):
            latent = w.clone().requires_grad_()
            with fused(enabled):
                both = compress_with_powers(latent, step, codes, pattern=NMPattern(2, 4))
                both[use].square().sum().backward()
            found.append([both[0].detach(), both[1].detach(), latent.grad])
        assert_same(*found, 1e-5)


def test_same_where_a_weight_is_not_a_number() -> None:
    w = normal(4, 8, seed=6)
    step = mse_init_step(w, weight_codes('lsq', 4))
    w[1, 2] = float('nan')
    with fused():
        compressed, powers = compress_with_powers(w, step, weight_codes('lsq', 4))
    assert compressed.isnan().nonzero().tolist() == [[1, 2]]
    assert powers[0].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_same_activations(signed: bool, dtype: torch.dtype) -> None:
    codes = activation_codes(4, signed)
    x = normal(3, 5, 11, 17, seed=7).to(dtype)
    x[0, 0, 0, :3] = torch.tensor([float('inf'), -float('inf'), 1e30])
    upstream = normal(*x.shape, seed=9).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for enabled in (False, True):
            values = x.clone(memory_format=layout).requires_grad_()
            step = torch.tensor([0.21], device=DEVICE).requires_grad_()
            with fused(enabled):
                assert (activation_kernels(values) is not None) == enabled
                y = lsq_quantize(values, step, codes.qn, codes.qp, 0.5)
                y.backward(upstream)
            results.append([y.detach(), values.grad, step.grad])
        assert_same(*results, 1e-5)


def mixed_net() -> nn.Module:
    """Layers that are compressed together, and some that are not: 2 x 2 kernels are transposed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Linear(4, 4),
    ).to(DEVICE)
    convert(net, dict(weight=dict(sparsity='2:4', bits=3)))
    return net


@pytest.mark.parametrize('hold', [False, True])
def test_a_model_trains_as_by_plain_passes(monkeypatch: pytest.MonkeyPatch, hold: bool) -> None:
    """Losses and gradients of four steps; the last layer does not run in the second.

    Layers that ran once are compressed together in the next step.
    """
    monkeypatch.setattr(compress_many, 'BUNDLE', 200)
    results = []
    for enabled in (False, True):
        net = mixed_net()
        layers = compressed_layers(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        wrapper = SlopeOptimWrapper(optimizer, regularizer=dict(type='cosine', weight=0.5))
        net[2].requires_grad_(False)
        for layer in layers.values() if hold else ():
            layer.hold_mask()
        seen, together = [], []
        for step in range(4):
            with fused(enabled), wrapper.optim_context(net):
                together.append({n for n, layer in layers.items() if layer._shared is not None})
                y = net[:-1](normal(2, 3, 4, 4, seed=step))
                y = y if step == 1 else net[-1](y)
                loss = y.square().mean()
                regularization = wrapper.regularizer(layers.values())
                wrapper.zero_grad()
                wrapper._end_step()
                with fused(enabled):
                    (loss + regularization).backward()
            # Nothing lives on that a layer's next step would find.
            assert all(layer._shared is None for layer in layers.values())
            seen += [loss.detach(), regularization.detach()]
            seen += [torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()]
            optimizer.step()
        results.append(seen)
        kinds = {'0', '2', '3', '5', '8', '9'} if enabled else set()
        assert together == [set(), kinds, kinds - {'9'}, kinds]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_finds_what_the_forward_had(reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        net = mixed_net()
        wrapper = SlopeOptimWrapper(
            torch.optim.SGD(net.parameters(), lr=0.05),
            regularizer=dict(type='cosine', weight=0.5),
        )
        with fused(enabled):
            for step in range(2):
                with wrapper.optim_context(net):
                    x = net[:2](normal(2, 3, 4, 4, seed=step))
                    x = checkpoint(net[2:5], x, use_reentrant=reentrant)
                    loss = net[5:](x).square().mean()
                wrapper.update_params(loss)
        results.append([p.detach() for p in net.parameters()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
