"""The graphs: trained codes inside, the function of the torch model outside."""

from __future__ import annotations

import graph_nets
import numpy as np
import onnx
import pytest
import torch
from graph_nets import constants, graphs, image, net, recipe, run
from onnx import TensorProto
from torch import nn

import slope_mm
from slope_mm.export import strips
from slope_mm.export.gate import relative_error
from slope_mm.export.nodes import count_products
from slope_mm.export.requantize import Targets
from slope_mm.ops import positive

RECIPES = [
    recipe(),
    recipe(codes='symmetric', bits=3, activation=3),
    recipe(codes='odd', bits=2, activation=2, sparsity='2:8'),
    recipe(codes='odd', bits=4, sparsity=None),
    recipe(bits=8, activation=8, sparsity=None),
    recipe(step='tensor'),
    recipe(activation=None),
    recipe(bits=2, activation=8, sparsity='unstructured:0.5'),
]
IDS = ['lsq4', 'symmetric3', 'odd2', 'odd4_dense', 'lsq8', 'tensor', 'weight_only', 'w2a8']
SIZES = [(1, 40, 48), (2, 56, 40)]


@pytest.mark.parametrize('settings', RECIPES, ids=IDS)
def test_both_graphs_compute_what_torch_computes(settings: dict) -> None:
    model = net(settings)
    portable, cpu, _ = graphs(model)
    for size in SIZES:
        x = image(*size)
        with torch.no_grad():
            expected = model(x)
        for graph in (portable, cpu):
            for found, wanted in zip(run(graph, x), expected, strict=True):
                assert relative_error(found, wanted) < 1e-5


def test_a_plain_model_is_exported_too() -> None:
    model = net(None)
    portable, _, _ = graphs(model)
    with torch.no_grad():
        expected = model(image())
    for found, wanted in zip(run(portable, image()), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
    assert {'QuantizeLinear', 'DequantizeLinear', 'BatchNormalization'}.isdisjoint(
        node.op_type for node in portable.graph.node
    )


@pytest.mark.parametrize('settings', RECIPES, ids=IDS)
def test_stored_integers_are_the_trained_codes(settings: dict) -> None:
    model = net(settings)
    portable, _, _ = graphs(model)
    stored = constants(portable)
    norms = {'stem.0': model.stem[1], 'wide.0': model.wide[1], 'narrow.0': model.narrow[1]}
    for name, layer in slope_mm.compressed_layers(model).items():
        integers = stored[f'{name}.weight.codes'].astype(np.int64)
        if isinstance(layer, nn.Linear):
            integers = integers.T
        trained = layer.codes().numpy().astype(np.int64)
        scale = stored[f'{name}.weight.scale'].astype(np.float64)
        step = positive(layer.step).numpy().astype(np.float64).reshape(-1)
        if layer.slope_spec.codes == 'odd':
            # {+-1, +-3, ...} * step / 2; masked weights are zeros.
            kept = np.ones_like(trained, bool) if layer.mask is None else layer.mask.numpy()
            trained, step = np.where(kept, 2 * trained + 1, 0), step / 2
        shape = [1] * trained.ndim
        shape[layer.output_axis] = -1
        factor = np.ones(len(scale))
        if name in norms:
            norm = norms[name]
            sigma = np.sqrt(norm.running_var.numpy() + norm.eps)
            factor = norm.weight.detach().numpy() / sigma
        signs = np.where((factor < 0) != (scale < 0), -1, 1).reshape(shape)
        assert np.array_equal(integers, trained * signs), name
        assert np.allclose(np.abs(scale), np.maximum(step * np.abs(factor), 1e-30), rtol=1e-6)
        assert not stored.get(f'{name}.weight.zero', np.zeros(1)).any()


def test_activation_quantizers_carry_the_trained_step_and_clip_to_their_codes() -> None:
    model = net(recipe(activation=4))
    portable, _, calls = graphs(model)
    stored = constants(portable)
    makers = {out: node for node in portable.graph.node for out in node.output}
    kinds = set()
    for call in calls:
        layer = slope_mm.compressed_layers(model)[call.name]
        if layer.slope_spec.activation_bits != 4:
            continue
        clip = makers[call.codes]
        quantize = makers[clip.input[0]]
        assert stored[quantize.input[1]] == np.float32(positive(layer.slope_act_step).item())
        zero = stored[quantize.input[2]]
        bounds = tuple(int(stored[name]) for name in clip.input[1:])
        wanted = (-8, 7) if layer.activation_signed else (0, 15)
        assert (int(zero), bounds) == (0, wanted)
        assert zero.dtype == (np.int8 if layer.activation_signed else np.uint8)
        kinds.add(layer.activation_signed)
    assert kinds == {False, True}


def test_every_ungrouped_product_is_one_of_integers() -> None:
    _, cpu, calls = graphs(net(recipe()))
    counts = count_products(cpu.graph.node)
    # The grouped convolution and the overlapping transposed one stay; three have few channels.
    assert counts.pop('Conv') == 1 and counts.pop('ConvTranspose') == 1
    assert counts.pop('ConvInteger') == 3
    # One result goes to a single quantizer.
    assert counts.pop('QLinearConv') == 1
    assert counts == {'MatMulIntegerToFloat': len(calls) - 6}


def test_strips_of_rows_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an image has fewer rows than there are strips, and where a batch has several."""
    model = net(recipe())
    # The dilated convolution would give codes, and unfold nothing.
    monkeypatch.setattr(Targets, 'of', lambda self, result: None)
    _, whole, _ = graphs(model)
    monkeypatch.setattr(strips, 'STRIP_BYTES', 8192)
    _, cut, _ = graphs(model)
    found, before = (
        count_products(graph.graph.node)['MatMulIntegerToFloat'] for graph in (cut, whole)
    )
    # The dilated convolution's windows have 20 * 24 * 144 bytes: 9 strips; the strided one's 3.
    assert found == before + 8 + 2
    for size in (*SIZES, (1, 31, 17), (1, 6, 8)):
        for ours, wanted in zip(run(cut, image(*size)), run(whole, image(*size)), strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_int4_weights_compute_the_same() -> None:
    model = net(recipe())
    portable, cpu, _ = graphs(model, int4=True)
    kinds = {t.name: t.data_type for t in portable.graph.initializer}
    assert kinds['wide.0.weight.codes'] == TensorProto.INT4
    assert portable.opset_import[0].version == 21
    wide, _, _ = graphs(model)
    # Negated by the norm's sign, -8 became 8.
    assert constants(wide)['wide.0.weight.codes'].max() == 8
    assert len(portable.SerializeToString()) < len(wide.SerializeToString())
    for graph in (portable, cpu):
        for found, wanted in zip(run(graph, image()), run(wide, image()), strict=True):
            assert relative_error(found, wanted) < 1e-5


def test_levels_beyond_int8_become_int32() -> None:
    model = net(recipe(codes='odd', bits=8, activation=8))
    portable, cpu, _ = graphs(model)
    kinds = {t.name: t.data_type for t in portable.graph.initializer}
    assert kinds['wide.0.weight.codes'] == TensorProto.INT32
    with torch.no_grad():
        expected = model(image())
    for graph in (portable, cpu):
        for found, wanted in zip(run(graph, image()), expected, strict=True):
            assert relative_error(found, wanted) < 1e-5


def test_minus_128_keeps_its_code_where_the_norm_is_negative() -> None:
    model = net(recipe(bits=8, activation=8, sparsity=None))
    layer, norm = model.wide[0], model.wide[1]
    norm.weight.data[:] = -norm.weight.data.abs() - 0.1
    with torch.no_grad():
        layer.weight[3, 0, 0, 0] = -1000.0
    layer.end_sharing()
    assert layer.codes()[3].min() == -128
    portable, cpu, _ = graphs(model)
    stored = constants(portable)
    codes, scale = stored['wide.0.weight.codes'], stored['wide.0.weight.scale']
    assert codes.dtype == np.int8 and codes[3].min() == -128 and scale[3] < 0
    with torch.no_grad():
        expected = model(image())
    for graph in (portable, cpu):
        for found, wanted in zip(run(graph, image()), expected, strict=True):
            assert relative_error(found, wanted) < 1e-5


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = net(recipe())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(image())
    graphs(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(image()), expected, strict=True))


def test_a_layer_that_onnx_cannot_express_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode='reflect'))
    with pytest.raises(slope_mm.ExportError, match="layer '0' pads with 'reflect'"):
        graph_nets.describe_layers(slope_mm.convert(model, recipe(activation=None)))


def test_the_graphs_need_no_slope_mm() -> None:
    """ONNX's own operators in the portable graph; ONNX Runtime's in the other."""
    portable, cpu, _ = graphs(net(recipe()))
    assert {node.domain for node in portable.graph.node} == {''}
    assert {node.domain for node in cpu.graph.node} == {'', 'com.microsoft'}
    onnx.checker.check_model(portable, full_check=True)
