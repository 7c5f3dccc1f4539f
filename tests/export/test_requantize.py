"""Convolutions from codes to codes against sums in floats, and who becomes one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from graph_nets import compressed, constants, graphs, image, recipe, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slope_mm
from slope_mm.export.gate import relative_error
from slope_mm.export.nodes import count_products
from slope_mm.export.requantize import Codes, Requantized, Targets, requantized

INPUT, OUTPUT = Codes(0.031, 0, 15, 0), Codes(0.27, 0, 15, 0)
SIGNED = dict(low=-8, high=7, zero=128)


# --- the constants -------------------------------------------------------------------------------


def example(seed: int, bits: int = 4, inputs: int = 16) -> tuple[np.ndarray, ...]:
    """Weights, scales and bias of eight channels."""
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits - 1)
    weight = rng.integers(-limit, limit, (8, inputs, 3, 3)).astype(np.int8)
    scale = np.exp(rng.normal(-3, 0.7, 8)).astype(np.float32)
    return weight, scale, rng.normal(0, 0.5, 8).astype(np.float32)


def sums_of(weight: np.ndarray, source: Codes) -> list[np.ndarray]:
    """Every sum between the least and the largest that inputs can give, a channel."""
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    least = np.minimum(rows * source.low, rows * source.high).sum(1)
    most = np.maximum(rows * source.low, rows * source.high).sum(1)
    return [np.arange(a, b + 1) for a, b in zip(least, most, strict=True)]


def exact_codes(sums: np.ndarray, scale: float, bias: float, s: Codes, t: Codes) -> np.ndarray:
    """In fractions: Python rounds their halves to even numbers."""
    unit, shift = Fraction(s.step) * Fraction(float(scale)), Fraction(float(bias))
    found = [round((int(x) * unit + shift) / Fraction(t.step)) for x in sums]
    return np.clip(np.array(found, np.int64), t.low, t.high)


def assert_exact(
    weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, s: Codes, t: Codes
) -> bool:
    """Whether there are constants; if so, every sum of every channel has its code."""
    made = requantized(weight, scale, bias, s, t)
    if made is None:
        return False
    for channel, sums in enumerate(sums_of(weight, s)):
        kept = weight[channel] != 0
        factors = set((made.weight[channel][kept] / weight[channel][kept]).tolist()) or {0}
        (factor,) = factors
        assert factor % 1 == 0
        wanted = exact_codes(sums, scale[channel], bias[channel], s, t)
        assert np.array_equal(codes_of(sums * int(factor), made, channel, s, t), wanted)
    return True


def codes_of(sums: np.ndarray, made: Requantized, channel: int, s: Codes, t: Codes) -> np.ndarray:
    """As the runtime has it: fp32 behind the int32 sum, saturation, and the Clip."""
    scale = np.float32(s.step) * made.scale[channel] / np.float32(t.step)
    total = (sums + made.bias[channel]).astype(np.int32).astype(np.float32)
    return np.clip(np.rint(total * scale), t.low, t.high)


@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([INPUT, INPUT._replace(**SIGNED)]),
    st.sampled_from([OUTPUT, OUTPUT._replace(**SIGNED), OUTPUT._replace(high=3)]),
)
@settings(deadline=None, max_examples=40)
def test_codes_are_those_of_exact_arithmetic_for_every_sum(
    seed: int, bits: int, source: Codes, target: Codes
) -> None:
    assert assert_exact(*example(seed, bits), source, target)


@given(
    st.integers(0, 2**31),
    st.integers(1, 8),
    st.floats(0.01, 30),
    st.sampled_from([INPUT, INPUT._replace(**SIGNED), INPUT._replace(high=3)]),
    st.sampled_from([OUTPUT, OUTPUT._replace(**SIGNED), OUTPUT._replace(high=3)]),
)
@settings(deadline=None, max_examples=150)
def test_few_inputs_cross_few_borders(
    seed: int, inputs: int, size: float, source: Codes, target: Codes
) -> None:
    """Borders that no sum crosses bound the scale as well."""
    weight, scale, bias = example(seed, inputs=inputs)
    weight = weight[:, :, :1, :1]
    assert_exact(weight, scale * np.float32(size), bias * np.float32(4), source, target)


def test_the_scale_stays_below_borders_that_no_sum_crosses() -> None:
    """0.45 to 1.45 in steps of 0.1: the first border alone is crossed, the next one is near."""
    weight, bias = np.ones((1, 1, 1, 1), np.int8), np.full(1, 0.45, np.float32)
    scale = np.full(1, 0.1, np.float32)
    assert assert_exact(weight, scale, bias, Codes(1.0, 0, 10, 0), Codes(1.0, 0, 15, 0))


@given(st.integers(0, 2**31), st.sampled_from([OUTPUT, OUTPUT._replace(high=1)]))
@settings(deadline=None, max_examples=60)
def test_sums_on_borders_are_rounded_to_even_codes(seed: int, target: Codes) -> None:
    """Planted ones: steps whose quotient is no binary number, a bias that a sum takes there."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-8, 8, (8, 2, 1, 1)).astype(np.int8)
    source = INPUT._replace(step=float(rng.integers(1, 50)) / 64)
    target = target._replace(step=float(rng.integers(1, 200)) / 256)
    scale = (rng.integers(1, 30, 8) / 32).astype(np.float32)
    sums = np.array([rng.choice(s) for s in sums_of(weight, source)])
    borders = rng.integers(target.low, target.high, 8) + 0.5
    bias = (borders * target.step - sums * scale * source.step).astype(np.float32)
    assert_exact(weight, scale, bias, source, target)


@pytest.mark.parametrize(('low', 'code'), [(0, 0), (1, 2)])
def test_a_single_border_may_have_a_sum_on_it(low: int, code: int) -> None:
    """0.5 becomes 0 and 1.5 becomes 2."""
    weight, one = np.ones((1, 1, 1, 1), np.int8), np.ones(1, np.float32)
    source, target = Codes(1.0, 0, 2, 0), Codes(2.0, low, low + 1, 0)
    bias = np.full(1, 2 * low, np.float32)
    assert assert_exact(weight, one, bias, source, target)
    made = requantized(weight, one, bias, source, target)
    assert made is not None
    factor = made.weight.item()
    assert codes_of(np.array([factor]), made, 0, source, target) == code


def test_a_rounded_bias_alone_would_change_codes() -> None:
    """What the search is for: the given unit, with the bias nearest to the exact one."""
    changed = 0
    for seed in range(5):
        weight, scale, bias = example(seed)
        units = np.rint(bias / (INPUT.step * scale.astype(np.float64))).astype(np.int32)
        plain = Requantized(weight, scale, units)
        for channel, sums in enumerate(sums_of(weight, INPUT)):
            wanted = exact_codes(sums, scale[channel], bias[channel], INPUT, OUTPUT)
            changed += int((codes_of(sums, plain, channel, INPUT, OUTPUT) != wanted).sum())
    assert changed > 50


@pytest.mark.parametrize('source', [INPUT, INPUT._replace(**SIGNED), INPUT._replace(high=255)])
def test_sums_of_two_products_fit_in_16_bits(source: Codes) -> None:
    weight, scale, bias = example(1)
    made = requantized(weight, scale, bias, source, OUTPUT)
    assert made is not None and made.weight.dtype == np.int8 and made.bias.dtype == np.int32
    largest = np.abs(made.weight.astype(int)).max()
    assert largest > 8 and 2 * (source.high + source.zero) * largest < 2**15


@pytest.mark.parametrize('value', [-3.0, 0.4, 40.0])
def test_a_dead_channel_has_a_constant_code(value: float) -> None:
    """Batch norm's factor is 0, or all weights are pruned: nothing but the bias is left."""
    weight, scale, bias = example(2)
    scale[0], weight[3], bias[[0, 3]] = 1e-30, 0, value
    made = requantized(weight, scale, bias, INPUT, OUTPUT)
    assert made is not None and not made.weight[[0, 3]].any() and made.weight[1].any()
    for channel in (0, 3):
        (code,) = codes_of(np.zeros(1), made, channel, INPUT, OUTPUT)
        assert code == np.clip(np.rint(value / OUTPUT.step), 0, 15)


def test_no_bias_is_a_bias_of_zero() -> None:
    weight, scale, _ = example(2)
    found = [requantized(weight, scale, b, INPUT, OUTPUT) for b in (None, np.zeros(8, np.float32))]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('what', ['codes', 'negative', 'many borders', 'sums on borders'])
def test_what_does_not_fit_is_left_alone(what: str) -> None:
    weight, scale, bias = example(3)
    source, target = INPUT, OUTPUT
    if what == 'codes':
        # A pair of products of 8 bits each passes 16 bits.
        weight, source = np.full_like(weight, 65), INPUT._replace(high=255)
    elif what == 'negative':
        scale[2] = -scale[2]
    elif what == 'many borders':
        target = target._replace(step=OUTPUT.step / 16, high=255)
    else:
        # Halves are rounded to even codes, up and down in turn, which no scale does.
        source, target = source._replace(step=0.5), target._replace(step=0.5)
        scale, bias = np.full(8, 0.25, np.float32), np.zeros(8, np.float32)
    assert requantized(weight, scale, bias, source, target) is None


# --- the graph -----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Results that go to one quantizer each: strided, dilated, signed, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, padding=2)
        self.strided = nn.Conv2d(16, 32, 3, 2, 1)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.signed = nn.Conv2d(32, 16, 3, padding=1)
        self.tiling = nn.ConvTranspose2d(16, 16, 2, 2)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = self.signed(self.dilated(self.strided(x).relu())).relu()
        y = self.last(self.tiling(x).relu())
        return y, y.mean((2, 3))


def test_a_relu_before_a_signed_quantizer_stays() -> None:
    torch.manual_seed(0)
    model = compressed(Chain(), recipe())
    layers = slope_mm.compressed_layers(model)
    for name in ('dilated', 'tiling', 'last'):
        layers[name].set_activation_range(torch.tensor([-1.0, 1.3]), True)
    _, cpu, _ = graphs(model)
    assert count_products(cpu.graph.node)['QLinearConv'] == 4
    with torch.no_grad():
        expected = model(image())
    for found, wanted in zip(run(cpu, image()), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5


class Branches(nn.Module):
    """A convolution whose result goes to one more place, or to one alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        y = self.first(x).relu()
        if self.kind == 'added':
            return self.second(y), x + y
        if self.kind == 'returned':
            return self.second(y), y
        if self.kind == 'two quantizers':
            return self.second(y), self.third(y)
        if self.kind == 'shared by levels':
            smaller = self.first(x[:, :, ::2, ::2]).relu()
            return self.second(y), self.second(smaller)
        return self.second(y), y.new_zeros(1)


@pytest.mark.parametrize('bits', [2, 4])
@pytest.mark.parametrize('codes', ['lsq', 'symmetric', 'odd'])
def test_a_chain_goes_from_codes_to_codes(
    codes: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = compressed(Chain(), recipe(codes=codes, bits=bits))
    layers = slope_mm.compressed_layers(model)
    assert layers['signed'].activation_signed and not layers['dilated'].activation_signed
    _, cpu, _ = graphs(model)
    counts = count_products(cpu.graph.node)
    assert counts == {'QLinearConv': 4, 'ConvInteger': 1, 'MatMulIntegerToFloat': 1}
    monkeypatch.setattr(Targets, 'of', lambda self, result: None)
    _, floats, _ = graphs(model)
    assert 'QLinearConv' not in count_products(floats.graph.node)
    for size in ((1, 40, 48), (2, 56, 40), (1, 31, 17)):
        x = image(*size)
        with torch.no_grad():
            expected = model(x)
        for ours, other, wanted in zip(run(cpu, x), run(floats, x), expected, strict=True):
            np.testing.assert_array_equal(ours, other)
            assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize(
    ('kind', 'count'),
    [
        ('alone', 1),
        ('added', 0),
        ('returned', 0),
        ('two quantizers', 0),
        ('shared by levels', 2),
    ],
)
def test_who_gives_codes(kind: str, count: int) -> None:
    torch.manual_seed(0)
    model = compressed(Branches(kind), recipe())
    if kind == 'two quantizers':
        # As training moves them apart.
        slope_mm.compressed_layers(model)['third'].slope_act_step.data.mul_(1.03)
    _, cpu, _ = graphs(model)
    assert count_products(cpu.graph.node).get('QLinearConv', 0) == count
    weights = [n.input[3] for n in cpu.graph.node if n.op_type == 'QLinearConv']
    assert len(set(weights)) == min(count, 1) and set(weights) <= set(constants(cpu))
    x = image()
    with torch.no_grad():
        expected = model(x)
    for found, wanted in zip(run(cpu, x), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_eight_bits_stay_products_of_unfolded_codes() -> None:
    torch.manual_seed(0)
    model = compressed(Chain(), recipe(bits=8, activation=8, sparsity=None))
    _, cpu, _ = graphs(model)
    assert 'QLinearConv' not in count_products(cpu.graph.node)
