"""Files of each format version, written once: every later version has to read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_golden import CASES, GOLDEN, make, stock

import slope_mm
from slope_mm.packing import load_packed, read_packed

TOLERANCE = {'half': 2**-11, 'wide_groups': 2**-8}


@pytest.mark.parametrize('name', CASES)
def test_golden_files_are_read(name: str) -> None:
    path, model = GOLDEN / f'{name}.slope', make(name)
    packed, wanted = read_packed(path), slope_mm.bake(model).state_dict()
    assert packed.header['version'] == (2 if name == 'attention' else 1)
    assert packed.header['dataset_meta'] == {'classes': {'__tuple__': ['a', 'b']}}
    assert packed.keys() == wanted.keys()
    for key, value in wanted.items():
        found = packed[key].astype(np.float32)
        if name in TOLERANCE:
            np.testing.assert_allclose(found, value, rtol=TOLERANCE[name], atol=1e-7)
        else:
            assert np.array_equal(found, value), key
    for layer_name, layer in slope_mm.compressed_layers(model).items():
        codes, mask = packed.layers[layer_name].decode()
        if layer.slope_spec.bits is not None:
            assert np.array_equal(codes, layer.codes())
        assert (mask is None) == (layer.mask is None)
        assert mask is None or np.array_equal(mask, layer.mask)
    fresh = load_packed(path, stock(name))
    assert {n: str(la.slope_spec) for n, la in slope_mm.compressed_layers(fresh).items()} == {
        n: str(la.slope_spec) for n, la in slope_mm.compressed_layers(model).items()
    }
    if name == 'enumerative':
        assert torch.equal(fresh.conv.slope_act_step, torch.tensor([0.25]))
        assert fresh.conv.activation_signed is True
    if name == 'attention':
        assert torch.equal(fresh.attn.in_proj.slope_act_step, torch.full((3,), 0.25))
        assert [fresh.attn.in_proj.input_signed(i) for i in range(3)] == [True] * 3


def test_golden_files_are_small() -> None:
    files = sorted(GOLDEN.glob('*.slope'))
    assert [file.stem for file in files] == sorted(CASES)
    assert all(file.stat().st_size < 12_000 for file in files)
