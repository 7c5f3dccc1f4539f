"""Regularizers and metrics: against independent formulas in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import slope_mm
from slope_mm import ConfigError, RecipeError
from slope_mm.engine.regularization import Regularizer
from slope_mm.layers import CompressedLayer
from slope_mm.ops import (
    GRANULARITIES,
    REGULARIZERS,
    clipped_share,
    compress_weight,
    cosine,
    cosine_distance,
    flip_rate,
    get_regularizer,
    mse_init_step,
    nm_mask,
    relative_l2,
    sqnr_db,
    weight_codes,
    zero_share,
)

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    'conv': ((6, 8, 3, 2), 0),
    'linear': ((6, 16), 0),
    'transposed conv': ((8, 6, 2, 2), 1),
    'one filter': ((1, 8, 3, 3), 0),
    'one weight': ((1, 1), 0),
}
RECIPE = dict(weight=dict(sparsity='2:4', bits=4))


def random_tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def items(x: Tensor, granularity: str, axis: int) -> list[Tensor]:
    """The regularized items, as flat tensors in double precision."""
    if granularity == 'layer':
        return [x.double().flatten()]
    return [x.double().select(axis, i).flatten() for i in range(x.shape[axis])]


def reference(name: str, w: Tensor, compressed: Tensor, granularity: str, axis: int) -> Tensor:
    """The formulas of the design, one item after the other."""
    pairs = zip(items(w, granularity, axis), items(compressed, granularity, axis), strict=True)
    if name == 'cosine':
        return torch.stack([1 - (a @ b) / (a.norm() * b.norm()) for a, b in pairs])
    return torch.stack([(a - b).square().sum() / a.square().sum() for a, b in pairs])


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_values_and_gradients_are_those_of_the_formula(
    kind: str, granularity: str, name: str
) -> None:
    shape, axis = SHAPES[kind]
    upstream = random_tensor((shape[axis] if granularity == 'filter' else 1,), seed=3)
    leaves = [random_tensor(shape), 0.8 * random_tensor(shape) + 0.3 * random_tensor(shape, 1)]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    singles = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = reference(name, doubles[0], doubles[1], granularity, axis)
    values = get_regularizer(name, granularity)(singles[0], singles[1], granularity, axis)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-6)
    (expected * upstream.double()).sum().backward()
    (values * upstream).sum().backward()
    for single, double in zip(singles, doubles, strict=True):
        assert single.grad is not None and double.grad is not None
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize('name', ['cosine', 'l2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_compared_in_fp32(name: str, dtype: torch.dtype) -> None:
    w, other = random_tensor((64, 64)).to(dtype), random_tensor((64, 64), 1).to(dtype)
    values = get_regularizer(name)(w, other)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), reference(name, w, other, 'layer', 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_none_is_zero_and_has_no_graph(granularity: str) -> None:
    w = random_tensor((4, 8)).requires_grad_()
    values = REGULARIZERS['none'](w, w * 2, granularity, 0)
    assert values.tolist() == [0.0] * (1 if granularity == 'layer' else 4)
    assert not values.requires_grad


@pytest.mark.parametrize('scale', [1e-9, 1e-4, 1e4, 1e9])
def test_the_cosine_does_not_know_the_scale(scale: float) -> None:
    """Weights of a dead filter shrink for many epochs; squares of norms leave fp32 early."""
    w, other = random_tensor((4, 50)), random_tensor((4, 50)) + random_tensor((4, 50), 1)
    expected = cosine_distance(w, other, 'filter')
    torch.testing.assert_close(cosine_distance(w * scale, other * scale, 'filter'), expected)
    torch.testing.assert_close(cosine_distance(w, other * scale, 'filter'), expected)
    torch.testing.assert_close(cosine(w * scale, other * scale), cosine(w, other))


def test_the_cosine_of_equal_directions_is_zero_distance() -> None:
    w = random_tensor((4, 8))
    assert cosine_distance(w, 0.5 * w).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(w, -w).item() == pytest.approx(2, abs=1e-6)
    assert relative_l2(w, 0.5 * w).item() == pytest.approx(0.25)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float64, 12, elements=st.floats(-5, 5)),
    hnp.arrays(np.float64, 12, elements=st.floats(-5, 5)),
)
def test_l2_is_twice_the_cosine_distance_where_norms_are_equal(
    first: np.ndarray, second: np.ndarray
) -> None:
    """|w - w'|^2 = 2 |w|^2 (1 - cos) if |w'| = |w|."""
    if min(np.linalg.norm(first), np.linalg.norm(second)) < 1e-3:
        return
    w = torch.from_numpy(first)
    compressed = torch.from_numpy(second * np.linalg.norm(first) / np.linalg.norm(second))
    torch.testing.assert_close(
        relative_l2(w, compressed), 2 * cosine_distance(w, compressed), rtol=1e-4, atol=1e-5
    )


def test_l2_is_no_bound_on_the_cosine_for_other_norms() -> None:
    """The poster's "<=" fails: half of w has no angle to w, but a distance."""
    w = random_tensor((4, 8))
    assert relative_l2(w, w / 2).item() > 2 * cosine_distance(w, w / 2).item() + 0.2


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_zero_weights_cost_nothing_and_have_no_gradient(name: str, granularity: str) -> None:
    w = random_tensor((3, 8))
    w[1] = 0
    for weight in (w, torch.zeros(3, 8)):
        latent = weight.clone().requires_grad_()
        compressed = weight.clone().requires_grad_()
        values = get_regularizer(name)(latent, compressed, granularity, 0)
        values.sum().backward()
        zero_rows = (weight == 0).all(1)
        if granularity == 'filter':
            assert (values[zero_rows] == 0).all()
        for leaf in (latent, compressed):
            assert leaf.grad is not None and leaf.grad.isfinite().all()
            if granularity == 'filter':
                assert (leaf.grad[zero_rows] == 0).all()


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_a_filter_that_rounds_to_zero_has_no_direction_to_turn(granularity: str) -> None:
    """With one step per tensor and few bits a small filter may lose all its weights."""
    latent = random_tensor((2, 8)).requires_grad_()
    compressed = torch.zeros(2, 8, requires_grad=True)
    values = cosine_distance(latent, compressed, granularity)
    assert (values == 1).all()
    values.sum().backward()
    for leaf in (latent, compressed):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_descent_on_the_regularizer_aligns_a_tensor(name: str, granularity: str) -> None:
    """A few steps on the ungarnished formula, towards a fixed target."""
    target = random_tensor((4, 32), 1)
    w = random_tensor((4, 32)).requires_grad_()
    cosines = [float(cosine(w, target))]
    for _ in range(5):
        loss = get_regularizer(name)(w, target, granularity, 0).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= 0.5 * gradient / gradient.norm() * w.norm() * 0.1
        cosines.append(float(cosine(w, target)))
    assert cosines == sorted(cosines)
    assert cosines[-1] > cosines[0] + 0.02


@pytest.mark.parametrize('name', ['cosin', 'L2', '', None, ['cosine']])
def test_unknown_regularizers_are_refused(name: object) -> None:
    with pytest.raises(RecipeError, match=r"regularizer type=.*\['cosine', 'l2', 'none'\]"):
        get_regularizer(name)  # type: ignore[arg-type]


@pytest.mark.parametrize('granularity', ['layers', 'channel', None])
def test_unknown_granularities_are_refused(granularity: object) -> None:
    with pytest.raises(RecipeError, match=r"granularity=.*\['layer', 'filter'\]"):
        get_regularizer('cosine', granularity)  # type: ignore[arg-type]


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="nearest: 'cosine'"):
        get_regularizer('cosin')


# --- of a model ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of different sizes, and of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3)
        self.up = nn.ConvTranspose2d(16, 4, 2)
        self.fc = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.conv(x)).mean((2, 3)))


def compressed_net(**weight: object) -> nn.Module:
    return slope_mm.convert(Net(), dict(weight={**RECIPE['weight'], **weight}))


def layers_of(model: nn.Module) -> list[CompressedLayer]:
    return list(slope_mm.compressed_layers(model).values())


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_the_models_value_is_the_mean_over_items(name: str, granularity: str) -> None:
    model = compressed_net()
    values = [
        reference(name, layer.weight, layer.compressed_weight(), granularity, layer.output_axis)
        for layer in layers_of(model)
    ]
    flat = torch.cat(values)
    assert len(flat) == (3 if granularity == 'layer' else 16 + 4 + 12)
    measured = slope_mm.regularization(model, name, granularity)
    assert measured.shape == () and measured.dtype == torch.float32
    assert measured.item() == pytest.approx(flat.mean().item(), rel=1e-4)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_the_models_gradient_holds_the_compressed_weight_constant(
    name: str, granularity: str
) -> None:
    """It is piecewise constant in W, so this is the derivative almost everywhere."""
    model = compressed_net()
    slope_mm.regularization(model, name, granularity).backward()
    latents = [layer.weight.detach().double().requires_grad_() for layer in layers_of(model)]
    compressed = [layer.compressed_weight().detach().double() for layer in layers_of(model)]
    torch.cat(
        [
            reference(name, w, c, granularity, layer.output_axis)
            for w, c, layer in zip(latents, compressed, layers_of(model), strict=True)
        ]
    ).mean().backward()
    for layer, latent in zip(layers_of(model), latents, strict=True):
        assert layer.weight.grad is not None and latent.grad is not None
        torch.testing.assert_close(layer.weight.grad.double(), latent.grad, rtol=1e-3, atol=1e-7)
        assert layer.slope_step is not None and layer.slope_step.grad is not None


def test_the_gradient_is_a_finite_difference_of_the_whole_computation() -> None:
    """Of masking, rounding and all, for a change small enough to cross no boundary."""
    layer = slope_mm.convert(nn.Linear(8, 4), RECIPE).double()
    slope_mm.regularization(layer).backward()
    assert isinstance(layer, CompressedLayer) and layer.weight.grad is not None
    for index in np.ndindex(4, 8):
        measured = []
        for h in (2e-4, -2e-4):
            with torch.no_grad():
                layer.weight[index] += h
                measured.append(slope_mm.regularization(layer).item())
                layer.weight[index] -= h
        difference = (measured[0] - measured[1]) / 4e-4
        assert layer.weight.grad[index].item() == pytest.approx(difference, abs=2e-3)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['cosine', 'l2'])
@pytest.mark.parametrize('bits', [None, 4, 2])
def test_training_on_the_regularizer_alone_raises_every_cosine(
    name: str, granularity: str, bits: int | None
) -> None:
    """Through masks that move and steps that learn."""
    model = compressed_net(bits=bits)
    before = [float(cosine(la.weight, la.compressed_weight())) for la in layers_of(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        slope_mm.regularization(model, name, granularity).backward()
        optimizer.step()
    after = [float(cosine(la.weight, la.compressed_weight())) for la in layers_of(model)]
    assert all(new > old for new, old in zip(after, before, strict=True))


def test_the_straight_through_gradient_is_there_for_comparison() -> None:
    model = compressed_net()
    gradients = {}
    for kind in ('exact', 'ste'):
        model.zero_grad()
        slope_mm.regularization(model, gradient=kind).backward()
        gradients[kind] = [layer.weight.grad for layer in layers_of(model)]
    for layer, exact, ste in zip(
        layers_of(model), gradients['exact'], gradients['ste'], strict=True
    ):
        latent = layer.weight.detach().clone().requires_grad_()
        compressed = compress_weight(latent, layer.step, layer.mask, layer._codes)
        (cosine_distance(latent, compressed).sum() / 3).backward()
        torch.testing.assert_close(ste, latent.grad)
        assert not torch.allclose(exact, ste)


def test_frozen_and_dense_layers_add_nothing() -> None:
    model = compressed_net()
    whole = slope_mm.regularization(model)
    frozen: nn.Module = model.conv  # type: ignore[assignment]
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    values = [
        reference('cosine', layer.weight, layer.compressed_weight(), 'layer', 0)
        for layer in (model.up, model.fc)
    ]
    measured = slope_mm.regularization(model)
    assert measured.item() == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert measured.item() != pytest.approx(whole.item())
    measured.backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_a_model_without_compressed_weights_has_a_regularizer_of_zero() -> None:
    inputs_only = slope_mm.convert(nn.Linear(4, 4), dict(weight={}, activation=dict(bits=4)))
    for model in (nn.Linear(4, 4), inputs_only):
        assert slope_mm.regularization(model).item() == 0
        assert slope_mm.regularization(compressed_net(), 'none').item() == 0


def test_zero_weights_of_a_model_leave_everything_finite() -> None:
    model = compressed_net()
    nn.init.zeros_(model.conv.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        model.fc.weight[3] = 0  # type: ignore[index]
    for granularity in GRANULARITIES:
        for name in ('cosine', 'l2'):
            slope_mm.regularization(model, name, granularity).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 6
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_autocast_does_not_touch_the_regularizer(name: str) -> None:
    model = compressed_net()
    expected = slope_mm.regularization(model, name)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        measured = slope_mm.regularization(model, name)
    assert torch.equal(measured, expected)


# --- what a config may say -----------------------------------------------------------------------


def test_a_config_gives_weight_type_granularity_and_gradient() -> None:
    made = Regularizer.parse(dict(type='l2', weight=0.5, granularity='filter', _scope_='mmdet'))
    assert (made.type, made.weight, made.granularity, made.gradient) == (
        'l2',
        0.5,
        'filter',
        'exact',
    )
    assert Regularizer.parse(None)(layers_of(compressed_net())) is None


@pytest.mark.parametrize(
    ('given_config', 'error', 'message'),
    [
        (dict(type='cosine', wieght=1), ConfigError, "unknown key 'wieght'; nearest: 'weight'"),
        (dict(type='cosin'), RecipeError, "nearest: 'cosine'"),
        (dict(granularity='filters'), RecipeError, "nearest: 'filter'"),
        (dict(gradient='exakt'), ConfigError, "nearest: 'exact'"),
        (dict(weight=-1), ConfigError, 'weight=-1 is not a number >= 0'),
        (dict(weight=math.nan), ConfigError, 'weight=nan is not a number >= 0'),
        (dict(weight=math.inf), ConfigError, 'weight=inf is not a number >= 0'),
        (dict(weight='1'), ConfigError, "weight='1' is not a number >= 0"),
        ('cosine', ConfigError, "regularizer is 'cosine'; write"),
    ],
)
def test_a_bad_config_is_told_what_and_where(
    given_config: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Regularizer.parse(given_config)  # type: ignore[arg-type]


def test_lambda_and_its_schedule_scale_the_value() -> None:
    model = compressed_net()
    model(torch.randn(2, 8, 6, 6))
    regularizer = Regularizer('cosine', weight=0.3, scale=0.5)
    value = regularizer(layers_of(model))
    assert value is not None
    assert value.item() == pytest.approx(0.15 * slope_mm.regularization(model).item(), rel=1e-5)


def test_layers_that_did_not_run_get_no_gradient_but_count() -> None:
    model = compressed_net()
    layers = layers_of(model)
    layers[0].runs = 1
    value = Regularizer('cosine', 1.0)(layers)
    assert value is not None
    expected = cosine_distance(layers[0].weight, layers[0].compressed_weight()).item() / 3
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert [layer.weight.grad is None for layer in layers] == [False, True, True]
    for layer in layers:
        layer.runs = 0
    assert Regularizer('cosine', 1.0)(layers) is None


# --- metrics -------------------------------------------------------------------------------------


@pytest.fixture
def compressed_pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, compressed weight, step and mask at 2:4 and 3 bits."""
    w, codes = random_tensor((8, 16, 3, 3)), weight_codes('lsq', 3)
    mask = nm_mask(w, 2, 4)
    step = mse_init_step(w, codes, 0, mask)
    return w, compress_weight(w, step, mask, codes), step, mask


def test_cosine_and_sqnr_are_the_formulas(
    compressed_pair: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    a, b = (x.double().flatten() for x in compressed_pair[:2])
    assert float(cosine(a, b)) == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-5)
    expected = 10 * math.log10(float(a @ a) / float((a - b) @ (a - b)))
    assert float(sqnr_db(a, b)) == pytest.approx(expected, rel=1e-5)


def test_metrics_of_zero_and_of_equal_tensors() -> None:
    w, zero = random_tensor((4, 8)), torch.zeros(4, 8)
    assert float(cosine(zero, zero)) == 1
    assert float(cosine(w, zero)) == 0
    assert float(cosine(w, w)) == pytest.approx(1)
    assert float(sqnr_db(w, w)) == math.inf
    assert float(sqnr_db(zero, zero)) == math.inf
    assert float(sqnr_db(w, zero)) == pytest.approx(0, abs=1e-5)


def test_flip_rate_counts_changed_entries() -> None:
    before = nm_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2, 4)
    after = nm_mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 2, 4)
    assert float(flip_rate(before, after)) == 0.5
    assert float(flip_rate(before, before)) == 0


@pytest.mark.parametrize('masked', [True, False])
def test_shares_are_counted_over_kept_weights(
    compressed_pair: tuple[Tensor, Tensor, Tensor, Tensor], masked: bool
) -> None:
    w, compressed, step, mask = compressed_pair
    kept, clipped, zeros = 0, 0, 0
    for index in np.ndindex(*w.shape):
        if masked and not mask[index]:
            continue
        kept += 1
        v = w[index].item() / step[index[0], 0, 0, 0].item()
        clipped += not -4 < v < 3
        zeros += compressed[index].item() == 0
    given_mask = mask if masked else None
    share = float(clipped_share(w, step, weight_codes('lsq', 3), given_mask))
    assert share == pytest.approx(clipped / kept) and 0 < share < 1
    assert float(zero_share(compressed, given_mask)) == pytest.approx(zeros / kept)


@pytest.mark.parametrize('metric', [cosine, sqnr_db])
def test_metrics_have_no_graph(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    w = random_tensor((4, 8)).requires_grad_()
    value = metric(w, w * 0.9)
    assert not value.requires_grad and value.dtype == torch.float32 and value.shape == ()
