"""Reports: sizes against hand calculations, figures against the tensors, tables and CSV."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from convertible_net import Tied
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.metrics import LayerMetrics, layer_metrics, summary
from slope_mm.analysis.report import COLUMNS, Report, Row
from slope_mm.analysis.size import StoredBits

W4 = dict(weight=dict(sparsity='2:4', bits=4))
W4A4 = dict(**W4, activation=dict(bits=4))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """All kinds; what no kind exists for; and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 6, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.narrow = wrappers.Conv2d(6, 10, 1, bias=False)
        self.queries = nn.Embedding(7, 8)
        self.fc = nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer('anchors', torch.zeros(5, 4), persistent=False)


def rows(model: nn.Module, recipe: dict[str, Any] | None = None) -> dict[str, Row]:
    return {row.name: row for row in slope_mm.report(model, recipe)}


def one_layer(module: nn.Module, recipe: dict[str, Any]) -> Row:
    """The row of a converted layer, which the plan's row has to equal."""
    planned = rows(nn.Sequential(module), recipe)['0']
    row = rows(slope_mm.convert(nn.Sequential(module), recipe))['0']
    assert (row.stored, row.dense_bits) == (planned.stored, planned.dense_bits)
    return row


# --- sizes ---------------------------------------------------------------------------------------


def test_a_sparse_convolution_by_hand() -> None:
    """6 x 8 x 3 x 3 weights: half are kept, at 4 bits each; 3 bits a group; 6 fp32 steps."""
    row = one_layer(nn.Conv2d(8, 6, 3), W4)
    assert row.stored == StoredBits(codes=216 * 4, index=108 * 3, steps=6 * 32, other=6 * 32)
    assert row.stored_bits == 864 + 324 + 192 + 192
    assert row.dense_bits == (432 + 6) * 32


BY_HAND: dict[str, tuple[nn.Module, dict[str, Any], StoredBits]] = {
    # The steps of a transposed convolution belong to its second axis.
    'transposed': (
        nn.ConvTranspose2d(8, 6, 2),
        W4,
        StoredBits(codes=96 * 4, index=48 * 3, steps=6 * 32, other=6 * 32),
    ),
    'quantized input': (
        nn.Linear(8, 12, bias=False),
        W4A4,
        # An fp32 step and a byte that says whether there is a sign.
        StoredBits(codes=48 * 4, index=24 * 3, steps=12 * 32 + 32 + 8, other=0),
    ),
    'per tensor': (
        nn.Linear(8, 12),
        dict(weight=dict(sparsity='2:4', bits=4, step='tensor')),
        StoredBits(codes=48 * 4, index=24 * 3, steps=32, other=12 * 32),
    ),
    # C(8, 2) = 28 and C(16, 2) = 120 arrangements take 5 and 7 bits.
    '2:8': (
        nn.Linear(16, 4, bias=False),
        dict(weight=dict(sparsity='2:8', bits=4)),
        StoredBits(codes=16 * 4, index=8 * 5, steps=4 * 32, other=0),
    ),
    '2:16 at 2 bits': (
        nn.Linear(16, 4, bias=False),
        dict(weight=dict(sparsity='2:16', bits=2)),
        StoredBits(codes=8 * 2, index=4 * 7, steps=4 * 32, other=0),
    ),
    'dense': (
        nn.Conv2d(5, 6, 1),
        dict(weight=dict(bits=8)),
        StoredBits(codes=30 * 8, index=0, steps=6 * 32, other=6 * 32),
    ),
    'sparse at full precision': (
        nn.Linear(8, 4, bias=False),
        dict(weight=dict(sparsity='1:4')),
        StoredBits(codes=8 * 32, index=8 * 2, steps=0, other=0),
    ),
    'unstructured': (
        nn.Linear(10, 3, bias=False),
        dict(weight=dict(sparsity='unstructured:0.25', bits=4)),
        # round(7.5) is 8.
        StoredBits(codes=8 * 4, index=30, steps=3 * 32, other=0),
    ),
    'input alone': (
        nn.Linear(8, 4),
        dict(weight={}, activation=dict(bits=4)),
        StoredBits(codes=32 * 32, index=0, steps=40, other=4 * 32),
    ),
    'half precision': (
        nn.Linear(8, 4).half(),
        dict(weight=dict(sparsity='1:4')),
        StoredBits(codes=8 * 16, index=8 * 2, steps=0, other=4 * 16),
    ),
    'grouped': (
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        dict(weight=dict(bits=4)),
        StoredBits(codes=72 * 4, index=0, steps=8 * 32, other=0),
    ),
}


@pytest.mark.parametrize('case', BY_HAND)
def test_stored_bits_by_hand(case: str) -> None:
    module, recipe, expected = BY_HAND[case]
    assert one_layer(copy.deepcopy(module), recipe).stored == expected


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(['2:4', '1:2', '2:8', '4:8', '3:16', 'unstructured:0.3', None]),
    st.sampled_from([None, 2, 4, 8]),
    st.sampled_from([None, 4]),
    st.sampled_from(['channel', 'tensor']),
)
def test_the_size_is_what_the_layer_holds(
    sparsity: str | None, bits: int | None, activation: int | None, step: str
) -> None:
    """Codes are counted from the mask itself, steps from the parameters."""
    if sparsity is None and bits is None and activation is None:
        return
    recipe = dict(
        weight=dict(sparsity=sparsity, bits=bits, step=step), activation=dict(bits=activation)
    )
    layer: Any = slope_mm.convert(nn.Conv2d(16, 4, 3), recipe)
    kept = 576 if layer.mask is None else int(layer.mask.sum())
    stored = slope_mm.report(layer).rows[0].stored
    assert stored.codes == kept * (32 if bits is None else bits)
    expected = 0 if layer.step is None else layer.step.numel() * 32
    assert stored.steps == expected + (0 if activation is None else 32 + 8)
    assert stored.other == 4 * 32


def state_dict_bytes(model: nn.Module) -> int:
    """Of the stock keys."""
    tensors = [t for key, t in model.state_dict().items() if '.slope_' not in key]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize('half', [False, True])
def test_the_dense_size_is_that_of_the_state_dict(half: bool) -> None:
    model = Net().half() if half else Net()
    expected = state_dict_bytes(model)
    assert slope_mm.report(model).dense_bytes == expected
    assert slope_mm.report(model, W4A4).dense_bytes == expected
    assert slope_mm.report(slope_mm.convert(model, W4A4)).dense_bytes == expected


def test_a_stock_model_is_stored_as_it_is() -> None:
    made = slope_mm.report(Net())
    assert made.stored_bytes == made.dense_bytes
    assert made.ratio == 1
    assert made.totals['layers'] == 0 and made.totals['cosine_mean'] is None


def test_totals_are_the_sums_of_the_rows() -> None:
    model = slope_mm.convert(Net(), W4A4)
    made = slope_mm.report(model)
    t = made.totals
    bits = sum(row.stored_bits for row in made)
    assert t['stored_bytes'] == made.stored_bytes == math.ceil(bits / 8)
    parts = [t[f'{part}_bytes'] for part in ('code', 'index', 'step', 'other')]
    assert sum(parts) == bits / 8
    # Norm, embedding, scale, and the biases of compressed layers.
    others = 4 * 8 * 32 + 64 + 56 * 32 + 32 + (8 + 6 + 6 + 12) * 32
    assert t['other_bytes'] == others / 8
    assert t['ratio'] == made.ratio == made.dense_bytes / made.stored_bytes
    assert t['weights'] == 216 + 432 + 192 + 60 + 96
    assert t['layers'] == 5
    assert t['compressed_share'] == 1
    assert t['sparse_share'] == pytest.approx((432 + 192 + 96) / 996)
    cosines = [row.cosine for row in made if row.cosine is not None]
    assert len(cosines) == 5
    assert t['cosine_mean'] == pytest.approx(sum(cosines) / 5)
    assert t['cosine_worst'] == min(cosines)
    sqnrs = [row.sqnr_db for row in made if row.sqnr_db is not None]
    assert t['sqnr_db'] == pytest.approx(sum(sqnrs) / 5)


def test_a_shared_layer_is_counted_once() -> None:
    shared = nn.Conv2d(8, 8, 3)
    alone = slope_mm.report(slope_mm.convert(nn.Sequential(copy.deepcopy(shared)), W4))
    both = slope_mm.report(slope_mm.convert(nn.Sequential(shared, nn.Sequential(shared)), W4))
    assert both.totals == alone.totals
    assert [row.name for row in both] == ['0']


def test_parameters_that_modules_share_are_counted_once() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].__dict__.update(model[0].__dict__)
    assert slope_mm.report(model).dense_bytes == 4 * 4 * 4 + 8


def test_a_tied_weight_is_counted_once_unless_it_is_compressed_differently() -> None:
    stock = Tied()
    once = 4 * sum(parameter.numel() for parameter in stock.parameters())
    assert slope_mm.report(stock).dense_bytes == slope_mm.report(stock).stored_bytes == once
    model = slope_mm.convert(
        stock, dict(weight=dict(bits=4), rules=[dict(match='out', weight=dict(bits=2))])
    )
    report = slope_mm.report(model)
    assert report.dense_bytes == once
    # The table as it is; codes and steps of `first` and of `out`; three biases.
    codes = (8 * 8 * 4 + 16 * 8 * 2) // 8
    assert report.stored_bytes == 4 * 16 * 8 + codes + 4 * (8 + 16) + 4 * (8 + 8 + 16)


# --- rows ----------------------------------------------------------------------------------------


def test_every_parameterised_layer_has_a_row() -> None:
    model = slope_mm.convert(Net(), W4A4)
    table = rows(model)
    assert list(table) == ['', 'stem', 'norm', 'conv', 'up', 'narrow', 'queries', 'fc']
    told = {
        name: (row.kind, row.shape, row.pattern, row.bits, row.activation_bits, row.note)
        for name, row in table.items()
    }
    neither = 'not a matrix product or convolution'
    assert told == {
        '': ('Net', (1,), '', None, None, neither),
        'stem': ('Conv2d', (8, 3, 3, 3), 'dense', 8, 8, 'stem'),
        'norm': ('BatchNorm2d', (8,), '', None, None, neither),
        'conv': ('Conv2d', (6, 8, 3, 3), '2:4', 4, 4, ''),
        'up': ('ConvTranspose2d', (8, 6, 2, 2), '2:4', 4, 4, ''),
        'narrow': (
            'Conv2d',
            (10, 6, 1, 1),
            'dense',
            4,
            4,
            '6 input channels hold no 2:4: no sparsity',
        ),
        'queries': (
            'Embedding',
            (7, 8),
            '',
            None,
            None,
            'a table that is looked up or added, not multiplied',
        ),
        'fc': ('Linear', (12, 8), '2:4', 4, 4, ''),
    }


def test_a_plan_reports_what_the_conversion_will_be() -> None:
    """Everything but the figures that only a conversion can tell; the model stays as it was."""
    model = Net()
    recipe = dict(W4A4, rules=[dict(match='up', compress=False)])
    planned = slope_mm.report(model, recipe)
    assert not slope_mm.compressed_layers(model)
    assert all(row.cosine is None and row.sqnr_db is None for row in planned)
    done = slope_mm.report(slope_mm.convert(model, recipe))
    assert planned.stored_bytes == done.stored_bytes
    for before, after in zip(planned, done, strict=True):
        assert before.stored == after.stored
        assert before.cells()[:6] == after.cells()[:6]
    assert {row.name: row.note for row in planned}['up'] == "rule 'up'"
    assert {row.name: row.note for row in done}['up'] == 'excluded by a rule'


def test_figures_are_those_of_the_tensors() -> None:
    model = slope_mm.convert(Net(), W4A4)
    for name, layer in slope_mm.compressed_layers(model).items():
        row = rows(model)[name]
        a = layer.weight.detach().double().flatten()
        b = layer.compressed_weight().detach().double().flatten()
        cosine = float(a @ b / (a.norm() * b.norm()))
        sqnr = 10 * math.log10(float(a @ a) / float((a - b) @ (a - b)))
        assert row.cosine == pytest.approx(cosine, rel=1e-5)
        assert row.sqnr_db == pytest.approx(sqnr, rel=1e-4)
        assert 0.5 < cosine < 1


def test_a_report_leaves_the_model_as_it_is() -> None:
    model = slope_mm.convert(Net(), W4A4)
    before = copy.deepcopy(model.state_dict())
    made = slope_mm.report(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not isinstance(cell, Tensor) for row in made for cell in row.cells())


def test_zero_weights_and_exact_ones_are_reported() -> None:
    """Without an error the SQNR is infinite, and out of the mean."""
    model = slope_mm.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), W4)
    nn.init.zeros_(model[0].weight)  # type: ignore[index, arg-type]
    first, second = slope_mm.report(model)
    assert (first.cosine, first.sqnr_db) == (1, math.inf)
    assert slope_mm.report(model).totals['sqnr_db'] == second.sqnr_db
    assert 'nan' not in str(slope_mm.report(model))


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    with pytest.raises(slope_mm.RecipeError, match="'nowhere' matches no layer"):
        slope_mm.report(Net(), dict(W4, rules=[dict(match='nowhere')]))


# --- views ---------------------------------------------------------------------------------------


def test_the_csv_has_one_row_a_layer(tmp_path: Path) -> None:
    made = slope_mm.report(slope_mm.convert(Net(), W4A4))
    made.to_csv(tmp_path / 'layers.csv')
    with (tmp_path / 'layers.csv').open(newline='') as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [line['name'] for line in table] == [row.name for row in made]
    for line, row in zip(table, made, strict=True):
        assert line['shape'] == 'x'.join(str(size) for size in row.shape)
        assert line['bits'] == ('' if row.bits is None else str(row.bits))
        assert int(line['stored_bits']) == row.stored_bits
        assert int(line['dense_bits']) == row.dense_bits
        assert (float(line['cosine']) if line['cosine'] else None) == row.cosine


def test_the_table_shows_layers_reasons_and_totals() -> None:
    made = slope_mm.report(slope_mm.convert(Net(), W4A4), title='A net')
    text = str(made)
    lines = text.splitlines()
    assert lines[0] == 'A net'
    for row in made:
        if row.pattern:
            (line,) = [found for found in lines if found.split()[:1] == [row.name]]
            assert row.kind in line and row.note in line
            assert f'{row.cosine:.4f}' in line and f'{row.sqnr_db:.2f}' in line
            assert f'{row.stored_bits / 8e3:.1f}' in line
    # What holds no weights is one line a kind.
    assert any(line.startswith('1 x') and 'BatchNorm2d' in line for line in lines)
    assert '5 layers hold 100.00% of the 996 weights compressed' in text
    assert f'ratio {made.ratio:.1f}x' in text
    assert f'worst {made.totals["cosine_worst"]:.4f}' in text


def test_a_report_of_nothing_prints() -> None:
    made = slope_mm.report(nn.ReLU())
    assert len(made) == 0 and made == Report(())
    assert made.stored_bytes == 0 and '0 layers' in str(made)


# --- metrics of layers ---------------------------------------------------------------------------


def test_layer_metrics_are_counted_over_kept_weights() -> None:
    layer: Any = slope_mm.convert(nn.Linear(64, 32), dict(weight=dict(sparsity='2:4', bits=2)))
    measured = layer_metrics('fc', layer)
    mask, codes = layer.mask, layer.codes()
    assert (measured.name, measured.spec) == ('fc', '2:4 W2 A32')
    assert measured.zeros == pytest.approx(float((codes[mask] == 0).float().mean()))
    v = (layer.weight / layer.step)[mask]
    assert measured.clipped == pytest.approx(float(((v <= -2) | (v >= 1)).float().mean()))
    assert 0 < measured.clipped < 1
    assert dict(zip(LayerMetrics.columns(), measured.values(), strict=True)) == vars(measured)


def test_layers_without_weight_bits_clip_nothing() -> None:
    layer: Any = slope_mm.convert(nn.Linear(8, 4), dict(weight=dict(sparsity='2:4')))
    assert layer_metrics('fc', layer).clipped == 0


def test_a_summary_counts_every_layer_once() -> None:
    made = [
        LayerMetrics('a', '', cosine=0.9, sqnr_db=10.0, clipped=0.1, zeros=0.0),
        LayerMetrics('b', '', cosine=0.7, sqnr_db=math.inf, clipped=0.3, zeros=0.5),
    ]
    assert summary(made) == pytest.approx(
        dict(cosine_mean=0.8, cosine_worst=0.7, sqnr_db=10.0, clipped=0.2, zeros=0.25)
    )
    assert summary(made[1:])['sqnr_db'] == math.inf
