"""Models to packed files and back: what they compute, what they hold, how large they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_reader
import torch
from convertible_net import W4, W4A4, Net, image, key_of, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slope_mm
from slope_mm import PackedFileError
from slope_mm.analysis.size import order0_bits
from slope_mm.engine.fit import check_fit
from slope_mm.ops import NMPattern, compress_weight, weight_codes
from slope_mm.packing import PackedFile, load_packed, packed_state_dict, read_packed, save_packed
from slope_mm.packing.plainconfig import from_plain

RECIPES: dict[str, dict[str, Any]] = {
    '2:4 W4': W4,
    '2:4 W4A4': W4A4,
    '2:16 W2 odd': dict(weight=dict(sparsity='2:16', bits=2, codes='odd')),
    'dense W4 per tensor': dict(weight=dict(bits=4, step='tensor', codes='symmetric')),
    'sparse': dict(weight=dict(sparsity='1:2')),
    'unstructured W3': dict(weight=dict(sparsity='unstructured:0.3', bits=3)),
    'q then s': dict(**W4, order='q_then_s', gradient='sr_ste'),
    'A4 alone': dict(weight=dict(), activation=dict(bits=4)),
}
CODINGS = ('smallest', 'bitmask', 'enumerative', 'entropy')


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / 'model.slope'


def compressed_state(model: nn.Module) -> dict[str, Tensor]:
    """The stock state dict with the compressed weights."""
    return slope_mm.bake(model).state_dict()


class Guided(nn.Module):
    """Leaves a part that it has from elsewhere out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.guide = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self._register_state_dict_hook(leave_out_guide)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.guide(x)


def leave_out_guide(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(f'{prefix}guide.')]:
        del state[key]


def test_what_a_model_leaves_out_of_its_checkpoints_is_not_asked_for(file: Path) -> None:
    rules = [dict(match='guide', compress=False), dict(match='conv')]
    recipe = dict(weight=dict(sparsity='2:4', bits=4), rules=rules)
    model = slope_mm.convert(Guided(), recipe)
    state = model.state_dict()
    assert 'conv.weight' in state and 'guide.weight' not in state
    check_fit(model, state, complete=True)
    del state['conv.bias']
    with pytest.raises(slope_mm.CheckpointError, match="'conv.bias' is missing"):
        check_fit(model, state, complete=True)
    save_packed(model, file)
    other = Guided()
    other.guide = model.guide
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(load_packed(file, other)(x), model(x))


@pytest.mark.parametrize('values', [[-0.0, 1, 2, 3], [-0.0, -0.0, -0.0, -0.0], [0, -0.0, 0, 0]])
def test_zeros_keep_their_sign(values: list[float], file: Path) -> None:
    model = trained(W4)
    model.register_buffer('shift', torch.tensor(values))
    save_packed(model, file)
    other = Net()
    other.register_buffer('shift', torch.ones(4))
    found = load_packed(file, other).shift
    assert found.view(torch.int32).tolist() == torch.tensor(values).view(torch.int32).tolist()


def test_a_buffer_that_no_file_can_hold_is_named(file: Path) -> None:
    model = trained(W4)
    model.register_buffer('turn', torch.ones(2, dtype=torch.complex64))
    with pytest.raises(PackedFileError, match=r"'turn' is torch.complex64.*persistent=False"):
        save_packed(model, file)
    assert not file.exists()


@pytest.mark.parametrize('coding', CODINGS)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_loaded_model_computes_the_same(recipe: str, coding: str, file: Path) -> None:
    model, x = trained(RECIPES[recipe]), image()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    length = save_packed(model, file, coding=coding)
    assert length == file.stat().st_size
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    # Into the stock model, into one of the same recipe, and as a state dict.
    stock = Net().eval()
    assert load_packed(file, stock) is stock
    same = load_packed(file, slope_mm.convert(Net(), RECIPES[recipe]).eval())
    by_state = slope_mm.convert(Net(), RECIPES[recipe]).eval()
    by_state.load_state_dict(packed_state_dict(PackedFile.open(file)), strict=True)
    for loaded in (stock, same, by_state):
        assert torch.equal(loaded(x), expected)
        layers = slope_mm.compressed_layers(loaded)
        for name, layer in slope_mm.compressed_layers(model).items():
            assert layers[name].slope_spec == layer.slope_spec
            assert torch.equal(layers[name].compressed_weight(), layer.compressed_weight())
            assert layers[name].activation_signed == layer.activation_signed
    # And by numpy, as the stock model's state dict.
    arrays = read_packed(file)
    state = compressed_state(model)
    assert arrays.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(torch.from_numpy(arrays[key].copy()), value), key


@pytest.mark.parametrize('coding', CODINGS)
def test_a_file_by_plain_loops(coding: str, file: Path) -> None:
    model = trained(RECIPES['2:16 W2 odd'])
    save_packed(model, file, coding=coding)
    content = file.read_bytes()
    slow_reader.check_sums(content)
    for name, layer in slope_mm.compressed_layers(model).items():
        mask, codes, steps = slow_reader.read_layer(content, name)
        order = layer.codes().movedim(layer.input_axis, -1).flatten()
        assert codes == order.tolist(), name
        assert steps == layer.step.abs().flatten().tolist()
        if layer.mask is not None:
            assert mask == layer.mask.movedim(layer.input_axis, -1).flatten().tolist()


@given(
    bits=st.integers(2, 8),
    codes=st.sampled_from(['lsq', 'symmetric', 'odd']),
    scale=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_quantizing_a_compressed_weight_again_changes_nothing(
    bits: int, codes: str, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """What loading relies on: a level by its step is that level's code."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(4, 16, generator=generator) * scale).to(dtype)
    step = torch.rand(4, 1, generator=generator) * scale / 2 ** (bits - 2) + 1e-8
    mask = NMPattern(2, 4).mask(w, 1)
    once = compress_weight(w, step, mask, weight_codes(codes, bits))
    assert torch.equal(compress_weight(once, step, mask, weight_codes(codes, bits)), once)


def test_fine_tuning_goes_on_from_a_loaded_model(file: Path) -> None:
    save_packed(trained(W4A4), file)
    model = load_packed(file, Net()).train()
    masks = {
        n: la.mask.clone()
        for n, la in slope_mm.compressed_layers(model).items()
        if la.mask is not None
    }
    before = compressed_state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(image()).square().sum() + slope_mm.regularization(model)).backward()
        optimizer.step()
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.mask, mask)
        assert not torch.equal(layer.compressed_weight(), before[key_of(name)])
        layer.release_mask()
        assert layer.mask.sum() == mask.sum()


def test_held_masks_and_ramps_are_kept(file: Path) -> None:
    model = trained(W4)
    model.conv.hold_mask()
    with torch.no_grad():
        # Now the largest weights are not the kept ones.
        model.conv.weight.mul_(torch.where(model.conv.slope_mask, 0.1, 10.0))
    # On the way to 2:4 from dense.
    model.up.set_pattern(NMPattern(3, 4))
    model.fc.set_pattern(None)
    x = image()
    expected = model(x)
    save_packed(model, file)
    layouts = {name: layer.layout for name, layer in read_packed(file).layers.items()}
    assert layouts['conv'].held and not layouts['up'].held
    assert layouts['up'].m == 0 and layouts['up'].kept == model.up.weight.numel() * 3 // 4
    assert layouts['fc'].kept == model.fc.weight.numel() and not layouts['fc'].sparse
    assert torch.equal(load_packed(file, Net().eval())(x), expected)


class Shared(nn.Module):
    """A head that two levels share, and norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 8)] * 2)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, x: Tensor) -> Tensor:
        for head, norm in zip(self.heads, self.norms, strict=True):
            x = norm(head(x))
        return x


def test_shared_modules_are_stored_once(file: Path) -> None:
    model, x = slope_mm.convert(Shared(), W4A4), torch.randn(4, 8)
    model(x)
    expected = model.eval()(x)
    save_packed(model, file)
    packed = read_packed(file)
    assert packed.header['aliases'] == {
        'heads.1.weight': 'heads.0.weight',
        'heads.1.bias': 'heads.0.bias',
    }
    assert packed.keys() == Shared().state_dict().keys()
    assert torch.equal(load_packed(file, Shared().eval())(x), expected)
    other = slope_mm.convert(Shared(), W4A4).eval()
    other.load_state_dict(packed_state_dict(PackedFile.open(file)), strict=True)
    assert torch.equal(other(x), expected)


def test_a_weight_that_two_layers_compress_differently_is_refused(file: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    slope_mm.convert(model, W4)
    with pytest.raises(PackedFileError, match=r"'0.weight' and '1.weight' are one parameter"):
        save_packed(model, file)
    assert not file.exists()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('recipe', ['2:4 W4', 'sparse'])
def test_half_the_bytes_for_the_rest(dtype: str, recipe: str, file: Path) -> None:
    model = trained(RECIPES[recipe])
    with torch.no_grad():
        # Beyond float16: its tensor keeps its dtype.
        model.norm.running_var[0] = 1e6
    whole = save_packed(model, file)
    assert save_packed(model, file, dtype=dtype) < whole
    packed, wanted = read_packed(file), compressed_state(model)
    overflows = dtype == 'float16'
    assert (packed['norm.running_var'].dtype == np.float32) or not overflows
    for key, value in wanted.items():
        torch.testing.assert_close(
            torch.from_numpy(packed[key].astype(np.float32)), value.float(), rtol=2**-8, atol=1e-6
        )
    loaded = load_packed(file, Net().eval())
    for name, layer in slope_mm.compressed_layers(loaded).items():
        assert torch.equal(
            layer.compressed_weight(), torch.from_numpy(packed[key_of(name)].astype(np.float32))
        )
        if layer.slope_spec.bits:
            # Steps may lose digits, codes may not.
            assert torch.equal(layer.codes(), model.get_submodule(name).codes())


def test_steps_that_float16_cannot_hold_stay_as_they_are(file: Path) -> None:
    model = trained(W4)
    with torch.no_grad():
        model.fc.slope_step.mul_(1e-5)
    save_packed(model, file, dtype='float16')
    layers = read_packed(file).header['layers']
    assert 'step_dtype' not in layers['fc'] and layers['conv']['step_dtype'] == 'F16'


def test_values_that_half_a_float_would_make_zero_stay_as_they_are(file: Path) -> None:
    model = trained(W4)
    with torch.no_grad():
        model.norm.weight[0] = 1e-9
    save_packed(model, file, dtype='float16')
    found = read_packed(file)['norm.weight']
    assert found.dtype == np.float32 and found[0] == np.float32(1e-9)


def test_keys_that_are_no_texts_come_back(file: Path) -> None:
    meta = dict(notes={1: 'one', '1': 'a text', (2, 3): [4], 'inner': {5: {6.5: None}}})
    save_packed(trained(W4), file, meta)
    assert from_plain(read_packed(file).header['notes']) == meta['notes']


def test_bfloat16_models(file: Path) -> None:
    model = slope_mm.convert(nn.Sequential(nn.Linear(16, 16)), W4).bfloat16()
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    expected = model(x)
    save_packed(model, file)
    assert torch.equal(load_packed(file, nn.Sequential(nn.Linear(16, 16)).bfloat16())(x), expected)


# --- the header ----------------------------------------------------------------------------------


def test_the_header_tells_recipe_and_meta(file: Path) -> None:
    model = trained(W4A4)
    model.slope_recipe = slope_mm.Recipe.parse(W4A4)
    save_packed(model, file, meta=dict(config=dict(model=dict(type='Net', strides=(4, 8))), run=7))
    header = read_packed(file).header
    assert header['version'] == 2 and header['run'] == 7
    assert slope_mm.Recipe.parse(header['recipe']) == model.slope_recipe
    assert header['config']['model'] == {'type': 'Net', 'strides': {'__tuple__': [4, 8]}}
    entry = {**header['layer_defaults'], **header['layers']['up']}
    assert entry['shape'] == [12, 6, 2, 2] and entry['axis'] == 0
    assert (entry['n'], entry['m'], entry['bits'], entry['qn'], entry['qp']) == (2, 4, 4, -8, 7)
    assert header['layers']['stem']['note'] == 'stem'
    assert load_packed(file, Net()).slope_recipe == model.slope_recipe


@pytest.mark.parametrize(
    ('options', 'part'),
    [
        (dict(coding='zip'), "coding='zip' is unknown"),
        (dict(dtype='int8'), "dtype='int8' is unknown"),
        (dict(meta={'layers': 1}), "meta has the key 'layers'"),
        (dict(meta={'a': {'b': object()}}), "meta['a'].b is a object"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], part: str, file: Path) -> None:
    with pytest.raises(PackedFileError) as error:
        save_packed(trained(W4), file, **options)
    assert part in str(error.value)
    assert not file.exists()


def test_a_model_without_compressed_layers_is_refused(file: Path) -> None:
    with pytest.raises(PackedFileError, match='no compressed layers'):
        save_packed(slope_mm.bake(trained(W4)), file)


# --- models that the file does not belong to -----------------------------------------------------


def other_channels() -> nn.Module:
    model = Net()
    model.fc = nn.Linear(16, 12)
    return model


def one_layer_less() -> nn.Module:
    model = Net()
    del model.narrow
    return model


def one_layer_more() -> nn.Module:
    model = Net()
    model.spare = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ('make', 'part'),
    [
        (other_channels, "tensor 'fc.weight' has shape (16, 16), and the model's (12, 16)"),
        (one_layer_less, "the model has no 'narrow.bias'"),
        (one_layer_more, "the file has no 'spare.bias'"),
        (
            lambda: slope_mm.convert(Net(), RECIPES['sparse']),
            "layer 'stem' was packed as 'dense W8",
        ),
    ],
)
def test_other_models_are_refused_and_left_alone(make: Any, part: str, file: Path) -> None:
    save_packed(trained(W4), file)
    model = make()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PackedFileError) as error:
        load_packed(file, model)
    assert part in str(error.value) and str(file) in str(error.value)
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- size ----------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(512, 256)
        self.b = nn.Linear(256, 512)


@pytest.mark.parametrize('recipe', ['2:4 W4', '2:16 W2 odd', 'unstructured W3', 'sparse'])
def test_a_files_length_is_the_calculated_size_and_its_header(recipe: str, file: Path) -> None:
    model = slope_mm.convert(Wide(), RECIPES[recipe])
    calculated = slope_mm.report(model).stored_bytes
    length = save_packed(model, file, coding='enumerative')
    header = int.from_bytes(file.read_bytes()[:8], 'little')
    # Length, header, its checksum; a section ends in a whole byte.
    assert 0 <= length - header - 12 - calculated <= 8


@pytest.mark.parametrize('recipe', ['2:4 W4', '2:16 W2 odd', 'unstructured W3'])
def test_entropy_coding_is_within_a_percent_and_a_half_of_the_bound(
    recipe: str, file: Path
) -> None:
    model = slope_mm.convert(Wide(), RECIPES[recipe])
    save_packed(model, file, coding='entropy')
    for name, layer in PackedFile.open(file).layers.items():
        bound = order0_bits(model.get_submodule(name)) / 8
        # Without the table, which a larger layer spreads over more codes.
        size = layer.payload.size - layer.layout.step_bytes - 4 * 2**layer.layout.bits
        assert bound <= size + 4 * 2**layer.layout.bits
        assert size < 1.015 * bound


def test_hardly_any_weight_is_kept(file: Path) -> None:
    """Its index needs less than the table of its entropy code."""
    recipe = dict(weight=dict(sparsity='unstructured:1e-12'))
    model = slope_mm.convert(nn.Sequential(nn.Conv2d(24, 12, 1)), recipe)
    save_packed(model, file, coding='entropy')
    found = read_packed(file)['0.weight']
    assert np.count_nonzero(found) <= 1
    assert np.array_equal(found, compressed_state(model)['0.weight'].numpy())
