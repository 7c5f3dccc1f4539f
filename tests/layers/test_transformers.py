"""Decoder layers of mmdet's transformers, Swin's windows, and random networks, end to end."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import W4, W4A4
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.backbones.swin import WindowMSA
from mmdet.models.layers.transformer import (
    DeformableDetrTransformerDecoderLayer,
    DetrTransformerDecoderLayer,
)
from mmdet.models.layers.transformer.mask2former_layers import Mask2FormerTransformerDecoderLayer
from torch import Tensor, nn

import slope_mm
from slope_mm.engine.audit import audit
from slope_mm.packing import load_packed, read_packed

E = 32
FFN = dict(embed_dims=E, feedforward_channels=64)
QUERY, KEY = torch.randn(2, 6, E), torch.randn(2, 20, E)


class Decoder(nn.Module):
    """Two layers, called as mmdet's decoders call them."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        attention = dict(embed_dims=E, num_heads=4, batch_first=True)
        cross: dict[str, Any] = dict(attention, dropout=0.0)
        if kind is DeformableDetrTransformerDecoderLayer:
            cross = dict(embed_dims=E, num_heads=4, num_levels=1, batch_first=True)
        self.layers = nn.ModuleList(
            kind(self_attn_cfg=attention, cross_attn_cfg=cross, ffn_cfg=FFN) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        given: dict[str, Any] = dict(
            key=KEY, value=KEY, query_pos=QUERY.flip(0), key_pos=KEY.flip(0), key_padding_mask=None
        )
        if isinstance(self.layers[0], DeformableDetrTransformerDecoderLayer):
            del given['key'], given['key_pos']
            given.update(
                reference_points=torch.rand(2, 6, 1, 2),
                spatial_shapes=torch.tensor([[4, 5]]),
                level_start_index=torch.tensor([0]),
            )
        for layer in self.layers:
            x = layer(x, **given)
        return x


DECODERS = [
    DetrTransformerDecoderLayer,
    Mask2FormerTransformerDecoderLayer,
    DeformableDetrTransformerDecoderLayer,
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def check_end_to_end(stock: nn.Module, x: Tensor, recipe: dict[str, Any], file: Path) -> None:
    """Convert, train a step, save and load, bake, pack: the same model all the way."""
    model = slope_mm.convert(copy.deepcopy(stock), recipe)
    layers = slope_mm.compressed_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().sum() + slope_mm.regularization(model)).backward()
        optimizer.step()
    assert not audit(model)
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert not lacking
    model.eval()
    with torch.no_grad():
        expected = model(x)
        again = slope_mm.convert(copy.deepcopy(stock), recipe).eval()
        again.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(again(x), expected)
        slope_mm.save_packed(model, file)
        loaded = load_packed(file, copy.deepcopy(stock).eval())
        assert torch.equal(loaded(x), expected)
        plain = copy.deepcopy(stock).eval()
        baked = slope_mm.bake(model)
        plain.load_state_dict(baked.state_dict(), strict=True)
        if 'activation' not in recipe:
            assert torch.equal(plain(x), expected)
        arrays, state = read_packed(file), baked.state_dict()
        assert arrays.keys() == state.keys()
        assert all(torch.equal(torch.from_numpy(arrays[key].copy()), state[key]) for key in state)
    report = slope_mm.report(model)
    assert {row.name for row in report if row.pattern} == set(layers)
    assert report.stored_bytes < report.dense_bytes


@pytest.mark.parametrize('recipe', [W4, W4A4])
@pytest.mark.parametrize('kind', DECODERS)
def test_decoder_layers(kind: type[nn.Module], recipe: dict[str, Any], tmp_path: Path) -> None:
    stock = Decoder(kind)
    report = slope_mm.report(stock, recipe)
    assert report.totals['compressed_share'] == 1
    check_end_to_end(stock, QUERY, recipe, tmp_path / 'decoder.slope')


def test_sampling_offsets_of_attention_keep_eight_bits() -> None:
    plans = {p.name: p for p in slope_mm.plan(Decoder(DECODERS[2]), W4A4)}
    offsets = plans['layers.0.cross_attn.sampling_offsets']
    assert (str(offsets.spec), offsets.reason) == ('dense W8 A8', 'sampling offsets')
    assert str(plans['layers.0.cross_attn.value_proj'].spec) == '2:4 W4 A4'


@pytest.mark.parametrize('recipe', [W4, W4A4])
def test_swins_windows(recipe: dict[str, Any], tmp_path: Path) -> None:
    stock = WindowMSA(E, 4, (3, 3))
    rows = {row.name: (row.weights, row.note) for row in slope_mm.report(stock, recipe)}
    assert rows[''] == (0, 'a table that is looked up or added, not multiplied')
    assert rows['qkv'] == (3 * E * E, '') and rows['proj'] == (E * E, '')
    check_end_to_end(stock, torch.randn(4, 9, E), recipe, tmp_path / 'windows.slope')


class RandomNet(nn.Module):
    """Linear layers, convolutions and attention in any order, some of them twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        made: list[nn.Module] = []
        for _ in range(draw.randint(3, 6)):
            choice = draw.randrange(6)
            if choice == 5 and made:
                made.append(draw.choice(made))
            elif choice in (0, 1):
                first = draw.random() < 0.5
                made.append(MultiheadAttention(E, draw.choice([1, 4]), batch_first=first))
            elif choice == 2:
                made.append(nn.Conv1d(E, E, 3, padding=1, groups=draw.choice([1, 8, 32])))
            elif choice == 3:
                made.append(nn.TransformerEncoderLayer(E, 2, 48, 0.0, batch_first=True))
            else:
                made.append(nn.Linear(E, E, bias=draw.random() < 0.5))
        self.parts = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if isinstance(part, nn.Conv1d):
                x = part(x.transpose(1, 2)).transpose(1, 2)
            else:
                x = x + part(x)
        return x


@pytest.mark.parametrize('seed', range(6))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    stock = RandomNet(seed)
    recipe = dict(
        weight=dict(sparsity=['2:4', '2:8', 'unstructured:0.4'][seed % 3], bits=3 + seed % 2),
        **({} if seed % 2 else dict(activation=dict(bits=4))),
    )
    if not any(hasattr(p, 'attn') or isinstance(p, nn.Linear) for p in stock.parts):
        stock.parts.append(nn.Linear(E, E))
    shared = len({id(p) for p in stock.parts})
    check = slope_mm.convert(copy.deepcopy(stock), recipe)
    assert len({id(p) for p in check.parts}) == shared
    # torch 2.1 has no switch.
    fast_path = getattr(torch.backends, 'mha', None)
    if any(isinstance(p, nn.TransformerEncoderLayer) for p in stock.parts):
        # Stock and compressed differ in the last bits: one takes torch's fast path.
        if fast_path is None:
            pytest.skip("this torch's fast path of encoder layers cannot be switched off")
        fast_path.set_fastpath_enabled(False)
    try:
        check_end_to_end(stock, torch.randn(2, 5, E), recipe, tmp_path / 'random.slope')
    finally:
        if fast_path is not None:
            fast_path.set_fastpath_enabled(True)
