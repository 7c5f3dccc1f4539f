"""Attention with compressed projections: against torch's own on the baked weights."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
import torch
from layer_cases import W4, W4A4, Recipe, compress
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor, nn

import slope_mm
from slope_mm import SlopeError
from slope_mm.analysis.bops import count_operations
from slope_mm.layers import activation
from slope_mm.layers.attention import SlopeMultiheadAttention
from slope_mm.ops import nm_mask

E, KEYS = 16, 7
# Every option that torch's attention has: its own, and those of a call.
OPTIONS: dict[str, dict[str, Any]] = {
    'plain': {},
    'batch first': dict(batch_first=True),
    'keys of another size': dict(kdim=8, vdim=12),
    'keys of another size, batch first': dict(kdim=8, vdim=12, batch_first=True),
    'one size differs': dict(kdim=8, bias=False),
    'biases of keys and values': dict(add_bias_kv=True, add_zero_attn=True),
    'dropout': dict(dropout=0.3),
    'no bias': dict(bias=False, batch_first=True),
}
CALLS = ('self', 'cross', 'masked', 'padded', 'weights of each head', 'unbatched')


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def attention(option: str) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(E, 4, **OPTIONS[option])
    for name, parameter in made.named_parameters():
        if 'bias' in name:
            nn.init.normal_(parameter)
    return made


def arguments(stock: nn.MultiheadAttention, call: str) -> dict[str, Any]:
    """Query, key, value and masks of a call."""
    query, batch = torch.randn(2, 5, E), 2
    key, value = torch.randn(2, KEYS, stock.kdim), torch.randn(2, KEYS, stock.vdim)
    if call == 'self' and stock._qkv_same_embed_dim:
        key = value = query
    if call == 'unbatched':
        query, key, value = query[0], key[0], value[0]
    elif not stock.batch_first:
        same = key is query
        query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
        key, value = (query, query) if same else (key, value)
    given: dict[str, Any] = dict(query=query, key=key, value=value)
    if call == 'masked':
        given['attn_mask'] = torch.rand(batch * 4, 5, KEYS) < 0.3
        given['need_weights'] = False
    if call == 'padded':
        given['key_padding_mask'] = torch.arange(KEYS).expand(2, -1) >= torch.tensor([[4], [6]])
        given['attn_mask'] = torch.randn(5, KEYS)
    if call == 'weights of each head':
        given['average_attn_weights'] = False
    return given


def run(module: nn.Module, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    return module(**given)


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('option', OPTIONS)
def test_the_forward_is_torchs_own_on_the_baked_weights(option: str, call: str) -> None:
    """To the last bit, in training and evaluation, with and without gradients (the fast path)."""
    stock = attention(option)
    given = arguments(stock, call)
    model = compress(copy.deepcopy(stock))
    stock.load_state_dict(slope_mm.bake(model).state_dict(), strict=True)
    for training in (True, False):
        model.train(training), stock.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                found, wanted = run(model, given), run(stock, given)
            assert torch.equal(found[0], wanted[0])
            assert (found[1] is None) == (wanted[1] is None)
            assert found[1] is None or torch.equal(found[1], wanted[1])


def test_evaluation_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = compress(attention('batch first')).eval(), torch.randn(2, 5, E)
    called = []
    fast = torch._native_multi_head_attention

    def native(*args: Any) -> Any:
        called.append(args[5])
        return fast(*args)

    monkeypatch.setattr(torch, '_native_multi_head_attention', native)
    with torch.no_grad():
        model(x, x, x)
    (used,) = called
    assert torch.equal(used, model.in_proj.compressed_weight())


@pytest.mark.parametrize('option', OPTIONS)
def test_masks_are_those_of_the_projections_rows(option: str) -> None:
    model = compress(attention(option))
    found = slope_mm.compressed_layers(model)
    packed = model._qkv_same_embed_dim
    assert set(found) == {'out_proj', *(['in_proj'] if packed else ['q_proj', 'k_proj', 'v_proj'])}
    for name, layer in found.items():
        parameter = (
            model.out_proj.weight if name == 'out_proj' else getattr(model, f'{name}_weight')
        )
        assert layer.weight is parameter
        assert torch.equal(layer.mask, nm_mask(parameter, 2, 4, 1))
        levels = layer.compressed_weight() / layer.step
        torch.testing.assert_close(levels, levels.round())
        assert levels.abs().max() <= 8


@pytest.mark.parametrize('option', ['plain', 'one size differs'])
def test_every_parameter_learns(option: str) -> None:
    model = compress(attention(option), W4A4)
    given = arguments(model, 'cross')
    (run(model, given)[0].square().sum() + slope_mm.regularization(model)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert all(layer.runs for layer in slope_mm.compressed_layers(model).values())


def test_the_gradient_passes_straight_through() -> None:
    """What torch's attention on the compressed weights gives its own, but for clipped weights."""
    stock = attention('plain')
    given, model = arguments(stock, 'cross'), compress(copy.deepcopy(stock))
    stock.load_state_dict(slope_mm.bake(model).state_dict())
    for module in (model, stock):
        run(module, given)[0].square().sum().backward()
    for layer, wanted in (
        (model.in_proj, stock.in_proj_weight.grad),
        (model.out_proj, stock.out_proj.weight.grad),
    ):
        levels = layer.weight / layer.step
        clipped = layer.mask & ((levels < -8) | (levels > 7))
        assert torch.equal(layer.weight.grad, wanted.masked_fill(clipped, 0))


# --- quantized inputs ----------------------------------------------------------------------------


def quantized(x: Tensor, step: float, signed: bool) -> Tensor:
    low, high = (-8, 7) if signed else (0, 15)
    return (x / step).round().clamp(low, high) * step


def by_hand(model: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One-headed attention of [length, E] inputs by matrix products, quantized at four places."""
    steps = model.in_proj.slope_act_step.tolist()
    signs = [bool(sign) for sign in model.in_proj.slope_act_signed]
    inputs = [quantized(*each) for each in zip((query, key, value), steps, signs, strict=True)]
    weights = model.in_proj.compressed_weight().chunk(3)
    biases = model.in_proj_bias.chunk(3)
    q, k, v = (x @ w.t() + b for x, w, b in zip(inputs, weights, biases, strict=True))
    mixed = (q @ k.t() / E**0.5).softmax(-1) @ v
    out = model.out_proj
    step = float(out.slope_act_step)
    x = quantized(mixed, step, bool(out.activation_signed))
    return x @ out.compressed_weight().t() + out.bias


def test_query_key_value_and_output_have_steps_of_their_own() -> None:
    model = compress(nn.MultiheadAttention(E, 1), W4A4)
    nn.init.normal_(model.in_proj_bias)
    query, key, value = torch.randn(5, E), 10 * torch.randn(KEYS, E), torch.rand(KEYS, E)
    first = model(query, key, value)[0]
    layer = model.in_proj
    assert [layer.input_signed(i) for i in range(3)] == [True, True, False]
    assert layer.slope_act_step[1] > 5 * layer.slope_act_step[0]
    expected = by_hand(model, query, key, value)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        evaluated = model.eval()(query, key, value)[0]
    torch.testing.assert_close(evaluated, expected, rtol=1e-4, atol=1e-5)
    # Kept as stock fake-quantizers.
    baked = slope_mm.bake(model, activations='fake_quant')
    assert type(baked) is nn.MultiheadAttention
    for module in (baked, pickle.loads(pickle.dumps(baked))):
        torch.testing.assert_close(module(query, key=key, value=value)[0], expected)
        assert list(module.state_dict()) == list(nn.MultiheadAttention(E, 1).state_dict())


@pytest.mark.parametrize('batch_first', [False, True])
def test_the_steps_gradient_counts_features_of_a_sample_wherever_samples_lie(
    batch_first: bool,
) -> None:
    images, tokens = 2, 50
    model = compress(nn.MultiheadAttention(E, 1, batch_first=batch_first), W4A4)
    shape = (images, tokens, E) if batch_first else (tokens, images, E)
    x = torch.randn(shape)
    model(x, x, x)
    seen = []
    quantize = activation.QuantizeLSQ.apply

    def noting(x: Tensor, step: Tensor, codes: Any, scale: float) -> Tensor:
        seen.append((scale, codes))
        return quantize(x, step, codes, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation.QuantizeLSQ, 'apply', noting)
        model(x, x, x)
        model(x[0], x[0], x[0])
    assert len(seen) == 8
    for number, (scale, codes) in enumerate(seen):
        # Without a batch all of it is one sample.
        features = tokens * E if number < 4 else x[0].numel()
        assert scale == pytest.approx(1 / math.sqrt(features * codes.largest))


def test_an_uncalibrated_input_is_told_in_evaluation() -> None:
    model = compress(attention('plain'), W4A4)
    with pytest.raises(SlopeError, match=r"2 input quantizers have no range yet \('out_proj'"):
        slope_mm.bake(model, activations='fake_quant')


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('option', ['plain', 'one size differs'])
@pytest.mark.parametrize('by', ['torch', 'mmengine'])
def test_state_dicts(option: str, by: str) -> None:
    """Stock checkpoints load without a word, own ones come back, and held masks with them."""

    def load(model: nn.Module, state: dict[str, Tensor]) -> None:
        if by == 'torch':
            model.load_state_dict(state, strict=True)
        else:
            mmengine_checkpoint.load_state_dict(model, copy.copy(state), strict=True)

    stock, other = attention(option), attention(option)
    model = compress(copy.deepcopy(other), W4A4)
    given = arguments(model, 'cross')
    run(model, given)
    for layer in slope_mm.compressed_layers(model).values():
        layer.hold_mask()
    state = copy.deepcopy(model.state_dict())
    assert set(stock.state_dict()) == {
        k for k in state if not k.split('.')[-1].startswith('slope_')
    }
    load(model, stock.state_dict())
    fresh = compress(copy.deepcopy(stock), W4A4)
    for name, layer in slope_mm.compressed_layers(model).items():
        wanted = slope_mm.compressed_layers(fresh)[name]
        assert torch.equal(layer.compressed_weight(), wanted.compressed_weight())
        assert layer.slope_mask is None and not layer.calibrated
    load(model, state)
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert all(la.slope_mask is not None for la in slope_mm.compressed_layers(model).values())


def test_copies_are_independent() -> None:
    model = compress(attention('plain'))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.in_proj.weight is other.in_proj_weight
        assert other.in_proj.weight is not model.in_proj.weight
    moved = copy.deepcopy(model).to(torch.float64)
    assert moved.in_proj.weight.dtype == torch.float64


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('match', 'rest'),
    [
        ('0.attn.in_proj', {'0.attn.out_proj'}),
        ('re:.*out_proj', {'0.attn.in_proj'}),
        ('0.attn', set()),
        ('type:MultiheadAttention', {'0.attn.out_proj'}),
    ],
)
def test_rules_name_the_projections(match: str, rest: set[str]) -> None:
    model = nn.Sequential(MultiheadAttention(E, 4), nn.Linear(E, 4))
    slope_mm.convert(model, dict(**W4, rules=[dict(match=match, compress=False)]))
    assert set(slope_mm.compressed_layers(model)) == {'1', *rest}
    stock = type(model[0].attn) is nn.MultiheadAttention
    assert stock == (not rest)
    x = torch.randn(5, 2, E)
    assert torch.equal(slope_mm.bake(model)(x), model(x))


def test_a_subclass_that_is_not_known_is_left_alone_with_its_output() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = nn.Sequential(Other(E, 4), nn.Linear(E, 4))
    plans = {p.name: (p.spec, p.reason) for p in slope_mm.plan(model, W4)}
    assert plans['0'] == (None, 'no compressed kind of Other')
    assert plans['0.out_proj'] == (None, 'Other may use its weight without its forward')
    assert plans['1'][0] is not None


def test_a_shared_attention_stays_shared() -> None:
    shared = attention('plain')
    model = compress(nn.ModuleDict(dict(a=shared, b=shared)))
    assert set(slope_mm.compressed_layers(model)) == {'a.in_proj', 'a.out_proj'}
    assert model['a'] is model['b'] and isinstance(model['a'], SlopeMultiheadAttention)
    compress(nn.ModuleDict(dict(a=nn.Linear(4, 4)))).load_state_dict({}, strict=False)
    again = compress(nn.ModuleDict(dict(a=(second := attention('plain')), b=second)))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(second.in_proj.compressed_weight(), shared.in_proj.compressed_weight())


# --- around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize('recipe', [W4, W4A4])
def test_the_encoder_layers_fast_path_does_not_read_latent_weights(recipe: Recipe) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 4, 24, batch_first=True), 2)
    stock, x = copy.deepcopy(model).eval(), torch.randn(2, 5, E)
    compress(model, recipe)
    model(x)
    model.eval()
    looks = '_forward_pre_hooks' in inspect.getsource(nn.TransformerEncoderLayer.forward)
    if recipe is W4A4 and not looks:
        pytest.skip("torch 2.1's fast path passes over hooks, fake quantizers among them")
    baked = slope_mm.bake(model, activations='fake_quant' if recipe is W4A4 else 'drop')
    assert [type(m) for m in baked.modules()] == [type(m) for m in stock.modules()]
    with torch.no_grad():
        torch.testing.assert_close(model(x), baked(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), stock(x), atol=1e-3)


@pytest.mark.parametrize('option', ['plain', 'keys of another size'])
def test_products_are_counted(option: str) -> None:
    """Compressed or not; a projection of three inputs once for each."""
    stock = attention(option).eval()
    given = arguments(stock, 'cross')
    wanted = 2 * E * (5 * E + KEYS * stock.kdim + KEYS * stock.vdim) + 2 * 5 * E * E
    for model in (stock, compress(copy.deepcopy(stock), W4A4)):
        counted = count_operations(model, lambda model=model: run(model, given))
        assert counted.macs == wanted
    assert counted.bops == wanted * 0.5 * 4 * 4
