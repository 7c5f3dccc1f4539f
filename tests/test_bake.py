"""Bake: baked models, a real detector among them, are stock models again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from convertible_net import W4, W4A4, Net, image, key_of, trained
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import slope_mm
from slope_mm import SlopeError
from slope_mm.engine.stock import save_stock
from slope_mm.layers import LAYER_KINDS

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- bake ----------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    '2:4 W4': W4,
    '2:16 W2 odd': dict(weight=dict(sparsity='2:16', bits=2, codes='odd')),
    'dense W4 per tensor': dict(weight=dict(bits=4, step='tensor', codes='symmetric')),
    'sparse': dict(weight=dict(sparsity='1:2')),
    'unstructured W3': dict(weight=dict(sparsity='unstructured:0.3', bits=3)),
    'q then s': dict(**W4, order='q_then_s'),
}


def assert_stock(model: nn.Module, stock: nn.Module) -> None:
    """Not a trace of the compression: classes, attributes, keys."""
    modules = dict(stock.named_modules())
    for name, module in model.named_modules():
        assert type(module) is type(modules[name]), name
        assert vars(module).keys() == vars(modules[name]).keys(), name
        assert list(module._parameters) == list(modules[name]._parameters), name
        assert list(module._buffers) == list(modules[name]._buffers), name
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('inplace', [False, True])
def test_a_baked_state_dict_makes_the_stock_model_compute_the_same(
    recipe: str, inplace: bool
) -> None:
    model, x = trained(RECIPES[recipe]), image()
    expected = model(x)
    weights = {n: la.compressed_weight() for n, la in slope_mm.compressed_layers(model).items()}
    baked = slope_mm.bake(model, inplace=inplace)
    assert (baked is model) is inplace
    stock = Net().eval()
    assert_stock(baked, stock)
    assert not torch.equal(stock(x), expected)
    stock.load_state_dict(baked.state_dict(), strict=True)
    assert torch.equal(stock(x), expected)
    assert torch.equal(baked(x), expected)
    for name, weight in weights.items():
        assert torch.equal(stock.state_dict()[key_of(name)], weight)


def test_baking_a_copy_leaves_the_model_as_it_was() -> None:
    model, x = trained(W4A4), image()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    baked = slope_mm.bake(model)
    with torch.no_grad():
        for parameter in baked.parameters():
            parameter.zero_()
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(model(x), expected)


def test_a_held_mask_is_baked() -> None:
    model, x = trained(W4), image()
    for layer in slope_mm.compressed_layers(model).values():
        layer.hold_mask()
        with torch.no_grad():
            layer.weight.copy_(layer.weight.flip(layer.input_axis))
    expected = model(x)
    assert torch.equal(slope_mm.bake(model)(x), expected)


def test_baking_within_a_scope_uses_todays_weight() -> None:
    model = slope_mm.convert(nn.Linear(8, 8), W4)
    with model.shared():  # type: ignore[operator]
        model.compressed_weight()  # type: ignore[operator]
        with torch.no_grad():
            model.weight.neg_()  # type: ignore[operator]
        baked = slope_mm.bake(model)
    assert torch.equal(baked.weight, model.compressed_weight())  # type: ignore[operator, arg-type]


def test_dropped_activations_are_dropped() -> None:
    """The baked model is the stock one on the compressed weights, with inputs at full precision."""
    model, x = trained(W4A4), image()
    weight_only = copy.deepcopy(model)
    for layer in slope_mm.compressed_layers(weight_only).values():
        layer.begin_observing()
    baked = slope_mm.bake(model)
    assert_stock(baked, Net())
    assert torch.equal(baked(x), weight_only(x))
    assert not torch.allclose(baked(x), model(x))


def test_kept_activations_are_stock_fake_quantizers() -> None:
    model, x = trained(W4A4), image()
    assert {la.activation_signed for la in slope_mm.compressed_layers(model).values()} == {
        True,
        False,
    }
    baked = slope_mm.bake(model, activations='fake_quant')
    torch.testing.assert_close(baked(x), model(x), rtol=1e-4, atol=1e-5)
    Net().load_state_dict(baked.state_dict(), strict=True)
    assert all(type(module) not in LAYER_KINDS.values() for module in baked.modules())
    again = pickle.loads(pickle.dumps(baked))
    assert torch.equal(again(x), baked(x))
    assert torch.equal(copy.deepcopy(baked)(x), baked(x))


@pytest.mark.parametrize('signed', [False, True])
def test_a_kept_quantizer_has_the_levels_of_the_trained_one(signed: bool) -> None:
    layer = slope_mm.convert(nn.Linear(4, 4, bias=False), dict(weight={}, activation=dict(bits=4)))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))  # type: ignore[operator]
    layer.set_activation_range(torch.tensor([1.0]), signed)  # type: ignore[operator]
    with torch.no_grad():
        layer.slope_act_step.fill_(0.25)  # type: ignore[operator, union-attr]
    x = torch.linspace(-9, 9, 4 * 500).reshape(500, 4) + 0.01
    baked = slope_mm.bake(layer, activations='fake_quant')
    assert torch.equal(baked(x), layer(x))
    low, high = (-8, 7) if signed else (0, 15)
    assert (baked(x).min().item(), baked(x).max().item()) == (low * 0.25, high * 0.25)


def test_a_quantizer_without_a_range_cannot_be_kept() -> None:
    model = slope_mm.convert(Net(), W4A4)
    with pytest.raises(SlopeError, match=r"9 input quantizers have no range yet \('stem'.*calib"):
        slope_mm.bake(model, activations='fake_quant')
    assert len(slope_mm.compressed_layers(model)) == 9
    assert_stock(slope_mm.bake(model), Net())


def test_an_input_of_zeros_stays_unquantized() -> None:
    """The values of DETR's first decoder layer: queries of zeros, which have no range."""
    model = nn.ModuleDict(dict(attn=nn.MultiheadAttention(8, 2), out=nn.Linear(8, 8)))
    slope_mm.convert(model, W4A4).train()
    x, zeros = torch.randn(5, 2, 8), torch.zeros(5, 2, 8)

    def run(model: Any) -> Tensor:
        return model.out(model.attn(x, x, zeros)[0] + x)

    run(model)
    assert [model.attn.in_proj.input_signed(i) for i in range(3)] == [True, True, None]
    expected = run(model.eval())
    with pytest.warns(UserWarning, match=r"2 layers \('attn.out_proj', ...\).*zeros alone"):
        baked = slope_mm.bake(model, activations='fake_quant')
    torch.testing.assert_close(run(baked), expected)
    assert not torch.allclose(run(slope_mm.bake(model)), expected, rtol=1e-3)


@pytest.mark.parametrize('activations', ['fake_quantize', '', None])
def test_unknown_ways_to_bake_are_refused(activations: Any) -> None:
    with pytest.raises(SlopeError, match=r"choose one of \['drop', 'fake_quant'\]"):
        slope_mm.bake(slope_mm.convert(Net(), W4), activations=activations)


def test_baking_keeps_hooks_modes_and_frozen_parameters() -> None:
    model = Net()
    model.conv.requires_grad_(False)
    calls: list[str] = []
    model.fc.register_forward_hook(lambda *_: calls.append('fc'))
    baked = slope_mm.bake(slope_mm.convert(model, W4)).eval()
    baked(image())
    assert calls == ['fc']
    frozen = {name for name, p in baked.named_parameters() if not p.requires_grad}
    assert frozen == {'conv.weight'}


def test_a_baked_model_may_be_converted_and_baked_again() -> None:
    """The values are levels already, so little is lost; the masks are the same."""
    model = trained(W4)
    masks = {n: la.mask for n, la in slope_mm.compressed_layers(model).items()}
    again = slope_mm.convert(slope_mm.bake(model), W4)
    for name, layer in slope_mm.compressed_layers(again).items():
        mask = masks[name]
        compressed = layer.compressed_weight()
        assert mask is None or (compressed[~mask] == 0).all()
        torch.testing.assert_close(compressed, layer.weight, rtol=0.2, atol=0.02)


def test_baking_a_stock_model_copies_it() -> None:
    stock, x = Net().eval(), image()
    baked = slope_mm.bake(stock)
    assert baked is not stock
    assert torch.equal(baked(x), stock(x))


def test_shared_layers_are_baked_once_and_stay_shared() -> None:
    shared = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Sequential(shared))
    x = torch.randn(2, 8, 4, 4)
    slope_mm.convert(model, W4)
    expected = model(x)
    baked: Any = slope_mm.bake(model)
    assert baked[0] is baked[2] is baked[4][0]
    assert type(baked[0]) is nn.Conv2d
    assert torch.equal(baked(x), expected)


def tied() -> Any:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    model[2].weight = model[0].weight
    return slope_mm.convert(model, W4)


@pytest.mark.parametrize('inplace', [False, True])
def test_a_tied_weight_that_layers_compress_alike_stays_tied(inplace: bool) -> None:
    model, x = tied(), torch.randn(5, 16)
    expected = model(x)
    baked: Any = slope_mm.bake(model, inplace=inplace)
    assert baked[0].weight is baked[2].weight
    assert torch.equal(baked(x), expected)


def test_a_tied_weight_that_layers_compress_differently_is_two(tmp_path: Path) -> None:
    model, x = tied(), torch.randn(5, 16)
    model(x)
    with torch.no_grad():
        model[2].slope_step.mul_(1.2)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"'0\.weight' and '2\.weight' were one parameter"):
        baked: Any = slope_mm.bake(model)
    assert torch.equal(baked(x), expected)
    assert not torch.equal(baked[0].weight, baked[2].weight)
    assert model[0].weight is model[2].weight
    with (
        pytest.warns(UserWarning, match='were one parameter'),
        pytest.raises(SlopeError, match=r"'0\.weight' and '2\.weight' are one parameter.*untie"),
    ):
        save_stock(model, tmp_path / 'stock.pth')
    assert not list(tmp_path.iterdir())


def test_a_weight_tied_to_a_layer_that_is_left_alone_leaves_that_one_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    x = torch.randn(5, 16)
    slope_mm.convert(model, dict(**W4, rules=[dict(match='1', compress=False)])).eval()
    expected = model(x)
    with pytest.warns(UserWarning, match='were one parameter'):
        baked = slope_mm.bake(model)
    assert torch.equal(baked(x), expected)


def test_a_baked_slope_model_keeps_no_hook_of_its_compression() -> None:
    """It trains with a plain optim wrapper and loads another model's part, as a stock one does."""
    init_default_scope('mmengine')
    model = MODELS.build(dict(type='slope_mm.SlopeModel', arch='ToyNet', recipe=W4))
    stock = MODELS.build(dict(type='ToyNet'))
    baked: Any = slope_mm.bake(model).train()
    for name in ('_forward_pre_hooks', '_forward_hooks', '_load_state_dict_pre_hooks'):
        assert getattr(baked, name).keys() == getattr(stock, name).keys()
        assert len(getattr(baked, name)) == len(getattr(stock, name))
    images = [tiny.ToyImages()[index] for index in range(4)]
    wrapper = build_optim_wrapper(baked, dict(optimizer=dict(type='SGD', lr=0.1)))
    before = baked.first.weight.clone()
    baked.train_step({key: [i[key] for i in images] for key in images[0]}, wrapper)
    assert not torch.equal(before, baked.first.weight)
    assert baked.load_state_dict({'mix.bias': torch.ones(8)}, strict=False).missing_keys
    assert len(model._forward_pre_hooks) == 3, 'the copy alone was baked'


# --- a real detector -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def build_detector() -> Iterator[Callable[[], Any]]:
    """Small stock Mask R-CNNs, each with weights of its own."""
    register_all_modules(init_default_scope=False)
    config = Config.fromfile(CONFIGS / '_base_/models/mask_rcnn_r18_small.py').model

    def build() -> nn.Module:
        with MMDET_MODELS.switch_scope_and_registry('mmdet'):
            model = MMDET_MODELS.build(copy.deepcopy(config))
        model.init_weights()
        return model.eval()

    yield build


def raw_outputs(detector: Any, images: Tensor) -> list[Tensor]:
    """What the backbone, the neck and every head compute, before any threshold or NMS."""
    sample = DetDataSample(metainfo=dict(img_shape=images.shape[-2:], scale_factor=(1.0, 1.0)))
    outputs: list[Tensor] = []

    def gather(thing: Any) -> None:
        if isinstance(thing, Tensor):
            outputs.append(thing)
        elif isinstance(thing, (tuple, list)):
            for part in thing:
                gather(part)

    with torch.no_grad():
        features = detector.extract_feat(images)
        gather(features)
        gather(detector.rpn_head(features))
        rois = torch.tensor([[0.0, 4, 4, 40, 50], [0, 10, 20, 60, 44], [0, 0, 0, 63, 63]])
        gather(tuple(detector.roi_head._bbox_forward(features, rois).values()))
        gather(tuple(detector.roi_head._mask_forward(features, rois).values()))
        gather(detector.forward(images, [sample], mode='tensor'))
    assert len(outputs) > 15
    return outputs


@pytest.fixture(scope='module')
def images() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('recipe', ['2:4 W4', 'unstructured W3'])
def test_a_detector_baked_into_a_stock_one_detects_the_same(
    build_detector: Callable[[], Any], images: Tensor, recipe: str
) -> None:
    detector = slope_mm.convert(build_detector(), RECIPES[recipe])
    expected = raw_outputs(detector, images)
    stock = build_detector()
    assert not torch.equal(raw_outputs(stock, images)[0], expected[0])
    stock.load_state_dict(slope_mm.bake(detector).state_dict(), strict=True)
    for measured, wanted in zip(raw_outputs(stock, images), expected, strict=True):
        assert torch.equal(measured, wanted)


def test_a_detector_with_quantized_inputs_keeps_them(
    build_detector: Callable[[], Any], images: Tensor
) -> None:
    detector = slope_mm.convert(build_detector(), W4A4)
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    raw_outputs(detector, images)
    detector.eval()
    assert all(la.calibrated for la in slope_mm.compressed_layers(detector).values())
    baked = slope_mm.bake(detector, activations='fake_quant')
    build_detector().load_state_dict(baked.state_dict(), strict=True)
    for measured, wanted in zip(
        raw_outputs(baked, images), raw_outputs(detector, images), strict=True
    ):
        # A value on the border of two levels may fall to either side.
        close = torch.isclose(measured, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert close.float().mean() > 0.98
    dropped = raw_outputs(slope_mm.bake(detector), images)
    assert not torch.allclose(dropped[0], raw_outputs(detector, images)[0], rtol=1e-2)


def test_a_stock_detectors_checkpoint_loads_into_a_compressed_one(
    build_detector: Callable[[], Any], images: Tensor
) -> None:
    stock = build_detector()
    detector = slope_mm.convert(build_detector(), W4A4)
    keys = detector.load_state_dict(stock.state_dict(), strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    own = {k: v for k, v in detector.state_dict().items() if '.slope_' not in k}
    assert list(own) == list(stock.state_dict())
    expected = raw_outputs(slope_mm.convert(stock, W4A4), images)
    for measured, wanted in zip(raw_outputs(detector, images), expected, strict=True):
        assert torch.equal(measured, wanted)
