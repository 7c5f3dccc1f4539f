"""The regularizer of a model: values, gradients, and what its config may say."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from regularizer_formulas import reference
from torch import Tensor, nn

import slope_mm
from slope_mm import ConfigError, RecipeError
from slope_mm.engine.regularization import Regularizer
from slope_mm.layers import CompressedLayer
from slope_mm.ops import GRANULARITIES, compress_weight, cosine, cosine_distance

RECIPE = dict(weight=dict(sparsity='2:4', bits=4))


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


@pytest.mark.parametrize('name', ['cosine', 'l2'])
def test_standardized_weights_are_compared_after_standardization(name: str) -> None:
    torch.manual_seed(0)
    model = slope_mm.convert(nn.Sequential(ConvWS2d(8, 4, 3)), RECIPE)
    weight = model[0].weight.detach()
    deviation, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True)
    latent = (weight - mean) / (deviation + 1e-5)
    wanted = reference(name, latent, model[0].compressed_weight().detach(), 'layer', 0)
    for gradient in ('exact', 'ste'):
        found = slope_mm.regularization(model, name, gradient=gradient)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


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


def test_a_weight_that_nothing_is_regularized_with_is_told() -> None:
    with pytest.warns(UserWarning, match="weight=10 has no effect with type='none'"):
        assert not Regularizer.parse(dict(type='none', weight=10)).active
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for given_config in (None, dict(type='none'), dict(type='none', weight=0)):
            assert not Regularizer.parse(given_config).active


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
