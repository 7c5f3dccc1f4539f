"""Products of 8 bits on machines that add pairs of them in 16 bits, and on all others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from graph_nets import constants, graphs, image, net, recipe, run
from torch import nn

import slope_mm
from slope_mm.export.gate import relative_error
from slope_mm.export.runtime import integer_products_are_exact, open_session, outputs_of
from slope_mm.export.saturation import without_saturation

LIMITS = np.iinfo(np.int16)
LOW_BITS = [recipe(), recipe(bits=7, activation=8, sparsity=None), recipe(bits=2, activation=8)]
EIGHT_BITS = recipe(bits=8, activation=8, sparsity=None)


def saturating(graph: onnx.ModelProto) -> list[str]:
    """Products of unsigned codes with signed weights in which some codes saturate a pair's sum."""
    stored = constants(graph)
    found = []
    for node in graph.graph.node:
        if node.op_type == 'ConvInteger':
            # Its weights are unsigned, its codes signed where they are int8.
            if stored[node.input[2]].dtype == np.int8:
                found.append(node.name or node.output[0])
        elif node.op_type == 'MatMulIntegerToFloat':
            weights = stored[node.input[1]]
            if weights.dtype == np.int8 and not LIMITS.min <= worst(weights) <= LIMITS.max:
                found.append(node.name or node.output[0])
        elif node.op_type == 'QLinearConv':
            weights = stored[node.input[3]].astype(int)
            # Its input's largest code is a bound of the Clip before it; without one 255.
            largest = max(
                (int(stored[n.input[2]]) for n in makers_of(graph, node.input[0])), default=255
            )
            if 2 * largest * np.abs(weights).max() > LIMITS.max:
                found.append(node.name or node.output[0])
    return found


def makers_of(graph: onnx.ModelProto, codes: str) -> list[onnx.NodeProto]:
    """The Clip that codes went through on their way, if any."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    node = makers[codes]
    while node.op_type in ('Transpose', 'Reshape'):
        node = makers[node.input[0]]
    return [node] if node.op_type == 'Clip' else []


def worst(weights: np.ndarray) -> int:
    """The farthest sum of two neighbours' products, any codes of 8 bits given."""
    pairs = weights[: len(weights) // 2 * 2].astype(int).reshape(-1, 2, weights.shape[1])
    high = 255 * np.maximum(pairs, 0).sum(1).max(initial=0)
    low = 255 * np.minimum(pairs, 0).sum(1).min(initial=0)
    return int(max(high, low, key=abs))


@pytest.mark.parametrize('settings', LOW_BITS, ids=['w4a4', 'w7a8', 'w2a8'])
def test_low_bits_need_no_other_form(settings: dict) -> None:
    _, cpu, _ = graphs(net(settings))
    changed = without_saturation(cpu)
    kinds = [
        {n.input[1]: constants(g)[n.input[1]].dtype for n in g.graph.node if 'Float' in n.op_type}
        for g in (cpu, changed)
    ]
    assert kinds[0] and kinds[0] == kinds[1]
    assert not saturating(changed)


def test_eight_bits_get_unsigned_weights() -> None:
    _, cpu, _ = graphs(net(EIGHT_BITS))
    changed = without_saturation(cpu)
    assert saturating(cpu) and not saturating(changed)
    before, after = constants(cpu), constants(changed)
    moved = 0
    for node in changed.graph.node:
        if node.op_type == 'MatMulIntegerToFloat' and after[node.input[1]].dtype == np.uint8:
            weights, zeros = after[node.input[1]], after[node.input[5]]
            assert np.array_equal(weights.astype(int) - zeros, before[node.input[1]])
            moved += 1
    assert moved
    # The graph that was given is as it was.
    assert all(np.array_equal(constants(cpu)[name], value) for name, value in before.items())


@pytest.mark.parametrize('settings', [*LOW_BITS, EIGHT_BITS], ids=['w4a4', 'w7a8', 'w2a8', 'w8a8'])
def test_the_other_form_computes_the_same(settings: dict) -> None:
    model = net(settings)
    _, cpu, _ = graphs(model)
    changed = without_saturation(cpu)
    onnx.checker.check_model(changed)
    for size in ((1, 40, 48), (2, 56, 40)):
        x = image(*size)
        with torch.no_grad():
            expected = model(x)
        for found, wanted in zip(run(changed, x), expected, strict=True):
            assert relative_error(found, wanted) < 1e-5
        for a, b in zip(run(changed, x), run(without_saturation(changed), x), strict=True):
            np.testing.assert_array_equal(a, b)


class Extreme(nn.Module):
    """A stem of few channels, a convolution that is unfolded, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, bias=False)
        self.conv = nn.Conv2d(32, 32, 3, bias=False)
        self.fc = nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.conv(self.stem(x).relu()).relu()
        return x, self.fc(x.mean((2, 3)))


def test_the_largest_codes_are_added_exactly() -> None:
    """All weights at 127 and all inputs at 255: every pair's sum is 64,770."""
    model = slope_mm.convert(Extreme(), EIGHT_BITS).eval()
    x = torch.ones(1, 4, 12, 12)
    with torch.no_grad():
        for name, inputs in (('stem', 4 * 9), ('conv', 32 * 9), ('fc', 32)):
            layer = slope_mm.compressed_layers(model)[name]
            # Each layer gives ones again: the sums are known.
            layer.weight.fill_(1 / inputs)
            layer.step.fill_(1 / inputs / 127)
            layer.set_activation_range(torch.tensor([0.0, 1.0]), False)
            layer.slope_act_step.fill_(1 / 255)
            layer.end_sharing()
            assert (layer.codes() == 127).all()
    with torch.no_grad():
        assert all(torch.allclose(y, torch.ones(())) for y in model(x))
    _, graph, _ = graphs(model, x=x)
    for found in run(graph, x):
        np.testing.assert_allclose(found, 1, rtol=1e-5)
    if not integer_products_are_exact():
        # What it would be without: sums that stop at 32,767.
        (first, _) = outputs_of(open_session(graph.SerializeToString(), 1), x)
        assert np.all(first < 0.6)
