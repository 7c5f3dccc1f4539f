"""Quantized inputs are not kept for the backward pass: same gradients, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import slope_mm
from slope_mm.layers.activation import kept_as_recipe, quantize_activation
from slope_mm.ops import activation_codes

CODES = activation_codes(4, signed=True)
Operator = Callable[[Tensor, Tensor], Tensor]

OPERATORS: dict[str, tuple[Operator, tuple[int, ...], tuple[int, ...]]] = {
    'conv': (lambda x, w: F.conv2d(x, w, padding=1), (2, 8, 6, 5), (4, 8, 3, 3)),
    '1x1 conv': (F.conv2d, (2, 8, 6, 5), (4, 8, 1, 1)),
    'grouped conv': (lambda x, w: F.conv2d(x, w, groups=2), (2, 8, 6, 5), (4, 4, 3, 3)),
    'transposed conv': (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        (2, 8, 3, 3),
        (8, 4, 2, 2),
    ),
    'linear': (F.linear, (5, 8), (4, 8)),
    'linear on tokens': (F.linear, (2, 7, 8), (4, 8)),
    'on a view of it': (lambda x, w: F.linear(x.flatten(1)[:, 2:10], w), (5, 2, 6), (4, 8)),
    'on what is copied from it': (lambda x, w: F.linear(x.double(), w.double()), (5, 8), (4, 8)),
}


@pytest.mark.parametrize('kind', OPERATORS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
def test_gradients_are_those_of_a_kept_input(kind: str, layout: str) -> None:
    operator, shape, weight_shape = OPERATORS[kind]
    results = []
    for recipe in (True, False):
        torch.manual_seed(0)
        leaf = torch.randn(shape)
        if layout == 'channels_last' and len(shape) == 4:
            leaf = leaf.contiguous(memory_format=torch.channels_last)
        elif layout == 'slice':
            leaf = torch.randn(2, *shape)
        leaf.requires_grad_()
        x = leaf[1] if layout == 'slice' else leaf
        step = torch.full((1,), 0.2, requires_grad=True)
        weight = torch.randn(weight_shape, requires_grad=True)
        quantized = quantize_activation(x, step, CODES)
        if recipe:
            with kept_as_recipe(quantized):
                y = operator(quantized, weight)
        else:
            y = operator(quantized, weight)
        # Twice: the graph may be asked again.
        y.square().sum().backward(retain_graph=True)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, step.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        assert found is not None and torch.equal(found, expected)


def bytes_held_after_forward(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward with gradients leaves allocated: its graph, and the output."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = model(x)
    del y
    events: Any = recorded.profiler
    changes = [e.nbytes() for e in events.kineto_results.events() if e.name() == '[memory]']
    return sum(changes)


def chain(bits: int | None) -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True)] for _ in range(6)
    ]
    model = nn.Sequential(*[module for block in blocks for module in block])
    recipe = dict(
        weight=dict(sparsity='2:4', bits=4), rules=[dict(match='re:.*', weight=dict(bits=4))]
    )
    if bits is not None:
        recipe['activation'] = dict(bits=bits)
    return slope_mm.convert(model, recipe)


def test_quantized_activations_are_not_in_memory_twice() -> None:
    """W4A4 keeps the bytes of W4: what a ReLU keeps serves the next layer's quantizer as well."""
    x = torch.randn(2, 16, 64, 64)
    held = {}
    for bits in (None, 4):
        model = chain(bits)
        # The first forward initialises steps and ranges.
        model(x)
        held[bits] = bytes_held_after_forward(model, x)
    one_activation = x.nbytes
    assert held[4] <= held[None] + 0.1 * one_activation


def test_nothing_of_a_step_stays_alive_after_it() -> None:
    model, x = chain(4), torch.randn(2, 16, 32, 32)
    layers = slope_mm.compressed_layers(model).values()
    model(x).sum().backward()
    with slope_mm.layers.shared_weights(layers):
        loss = model(x).sum() + slope_mm.regularization(model)
        loss.backward()
    assert all(vars(layer)['_shared'] is None for layer in layers)


@pytest.mark.skipif(not tiny.HAS_CUDA, reason=tiny.NEEDS_CUDA)
def test_a_steady_step_never_waits_for_the_device() -> None:
    model, x = chain(4).cuda(), torch.randn(2, 16, 32, 32, device='cuda')

    def step() -> None:
        with slope_mm.layers.shared_weights(slope_mm.compressed_layers(model).values()):
            loss = model(x).sum() + slope_mm.regularization(model)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
