"""Scopes that compute a compressed weight once, and when they compute it anew."""

from __future__ import annotations

import pytest
import torch
from layer_cases import compress, compress_slowly
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slope_mm
from slope_mm.layers import shared_weights
from slope_mm.ops import NMPattern


def graph_nodes(tensor: Tensor, name: str) -> int:
    """How many operations of this name a result was computed with."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return sum(name in node.name() for node in seen)


def test_a_scope_computes_the_weight_once() -> None:
    layer, x = compress(nn.Linear(8, 8)), torch.randn(2, 8)
    alone = layer(layer(layer(x)))
    assert graph_nodes(alone, 'CompressBackward') == 3
    alone.sum().backward()
    gradients = [layer.weight.grad, layer.slope_step.grad]
    layer.zero_grad()
    with layer.shared():
        together = layer(layer(layer(x)))
    assert graph_nodes(together, 'CompressBackward') == 1
    assert torch.equal(together, alone)
    together.sum().backward()
    torch.testing.assert_close([layer.weight.grad, layer.slope_step.grad], gradients)


def test_the_regularizer_shares_the_scopes_weight() -> None:
    model, x = compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), torch.randn(2, 8)
    with shared_weights(model):
        losses = [
            model(x).sum() + slope_mm.regularization(model, gradient=gradient)
            for gradient in ('exact', 'ste')
        ]
    alone = model(x).sum() + slope_mm.regularization(model)
    assert [graph_nodes(loss, 'CompressBackward') for loss in (*losses, alone)] == [2, 2, 4]


def test_after_a_scope_the_weight_is_computed_anew() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        before = layer.compressed_weight()
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.compressed_weight(), compress_slowly(layer))
    with layer.shared():
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))
    assert not torch.equal(layer.compressed_weight(), before)


def test_a_new_scope_drops_what_an_unclosed_one_left() -> None:
    layer = compress(nn.Linear(8, 8))
    layer.begin_sharing()
    layer.compressed_weight()
    with torch.no_grad():
        layer.weight.neg_()
    layer.begin_sharing()
    assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


def test_a_scope_closes_after_an_error() -> None:
    model = compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(ZeroDivisionError), shared_weights(model):
        model(torch.randn(2, 8))
        raise ZeroDivisionError
    for layer in model:
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


def test_a_scope_serves_passes_with_and_without_gradients() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        with torch.no_grad():
            assert not layer.compressed_weight().requires_grad
        assert layer.compressed_weight().requires_grad
        with torch.no_grad():
            assert not layer.compressed_weight().requires_grad
        layer.compressed_weight().sum().backward()
    assert layer.weight.grad is not None


def test_a_scope_notices_masks_and_checkpoints() -> None:
    layer = compress(nn.Linear(8, 8))
    with layer.shared():
        layer.compressed_weight()
        layer.set_pattern(NMPattern(1, 4))
        assert int((layer.compressed_weight() != 0).sum()) <= 16
        layer.set_pattern(NMPattern(2, 4))
        layer.compressed_weight()
        layer.load_state_dict(nn.Linear(8, 8).state_dict())
        layer.compressed_weight()
        assert torch.equal(layer.compressed_weight(), compress_slowly(layer))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """``with_cp=True`` of mmdet's backbones. The scope ends before the backward pass."""
    model = compress(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    x = torch.randn(2, 8, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        for layer in slope_mm.compressed_layers(model).values():
            layer.runs = 0
        with shared_weights(slope_mm.compressed_layers(model).values()):
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            loss = y.square().sum() + slope_mm.regularization(model)
        # The regularizer asks who ran before the backward pass runs them again.
        assert [layer.runs for layer in slope_mm.compressed_layers(model).values()] == [1, 1]
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_scope_notices_that_a_mask_is_let_go() -> None:
    layer = compress(nn.Linear(8, 8))
    layer.hold_mask()
    held = layer.mask
    with torch.no_grad():
        layer.weight.mul_(torch.where(held, 1.0, 10.0))
    with layer.shared():
        before = layer.compressed_weight()
        assert not before[~held].any()
        layer.release_mask()
        after = layer.compressed_weight()
    assert not torch.equal(before, after)
    assert torch.equal(after, compress_slowly(layer))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_a_layer_that_is_recomputed_in_two_places(use_reentrant: bool) -> None:
    """Without quantized inputs, whose values would be saved before the weight's."""
    if not (use_reentrant or hasattr(torch._C._autograd, '_top_saved_tensors_default_hooks')):
        pytest.skip('torch 2.1 does not tell that it will recompute')
    model = compress(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    x = torch.randn(2, 8, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        with shared_weights(slope_mm.compressed_layers(model).values()):
            y = x
            for part in (model, model[2]):
                y = checkpoint(part, y, use_reentrant=use_reentrant) if checkpointed else part(y)
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_steps_of_a_frozen_weight_learn_from_all_uses() -> None:
    layer = compress(nn.Linear(8, 8))
    layer.weight.requires_grad_(False)
    x, gradients = torch.randn(3, 2, 8), []
    for shared in (False, True):
        layer.zero_grad()
        if shared:
            layer.begin_sharing()
        sum(layer(part).square().sum() for part in x).backward()
        layer.end_sharing()
        gradients.append(layer.slope_step.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
