"""Damaged, lying and foreign files: always a PackedFileError that names what is wrong.

``SLOPE_FUZZ=20000`` makes that many mutated files instead of a few hundred.
"""

from __future__ import annotations

import json
import os
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import slow_reader
import torch
from convertible_net import Net, trained
from torch import nn

from slope_mm import PackedFileError
from slope_mm.packing import PackedFile, load_packed, read_packed, save_packed
from slope_mm.packing.reader import PackedWeights

MUTATIONS = int(os.environ.get('SLOPE_FUZZ', '400'))
W4A4 = dict(
    weight=dict(sparsity='2:4', bits=4),
    activation=dict(bits=4),
    rules=[
        dict(match='conv', weight=dict(sparsity='2:8', codes='odd')),
        dict(match='fc', weight=dict(sparsity='unstructured:0.3')),
        dict(match='up', weight=dict(bits=None)),
    ],
)


@pytest.fixture(scope='module', params=['enumerative', 'entropy'])
def content(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of payload, and a short header."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('packed') / 'model.slope'
    save_packed(trained(W4A4), path, dict(config=dict(name='net')), coding=request.param)
    return path.read_bytes()


def read(content: bytes) -> PackedWeights:
    return PackedWeights(PackedFile.parse(content, 'model.slope'))


def resigned(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with a changed header and right checksums: a lie, not a damage."""
    header = slow_reader.read_header(content)[1]
    change(header)
    tensors = safetensors.numpy.load(content)
    header['crc32'] = [
        zlib.crc32(tensors[name].tobytes()) for name in sorted(tensors) if name != ':header_crc32'
    ]
    return signed(tensors, header)


def signed(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    made = bytearray(safetensors.numpy.save(tensors, {'slope_mm': text}))
    size = int.from_bytes(made[:8], 'little')
    at = json.loads(made[8 : 8 + size])[':header_crc32']['data_offsets'][0] + 8 + size
    made[at : at + 4] = zlib.crc32(made[: 8 + size]).to_bytes(4, 'little')
    return bytes(made)


# --- damage --------------------------------------------------------------------------------------


def test_the_whole_file_is_readable(content: bytes) -> None:
    """What the other tests of this file damage; and re-signing it is no damage."""
    weights = read(content)
    assert weights.keys() == Net().state_dict().keys()
    again = read(resigned(content, lambda header: None))
    assert all(np.array_equal(again[key], weights[key]) for key in weights)


def test_truncation_at_any_byte(content: bytes) -> None:
    for length in range(len(content)):
        with pytest.raises(PackedFileError, match=r'model\.slope'):
            PackedFile.parse(content[:length], 'model.slope')
    with pytest.raises(PackedFileError):
        PackedFile.parse(content + b'\0', 'model.slope')


def test_any_flipped_byte(content: bytes) -> None:
    """Each byte once, with a mask that changes over the file."""
    damaged = bytearray(content)
    for at in range(len(content)):
        damaged[at] ^= 1 << at % 8 if at % 3 else 0xFF
        with pytest.raises(PackedFileError, match=r'model\.slope'):
            PackedFile.parse(bytes(damaged), 'model.slope')
        damaged[at] = content[at]


def test_damage_to_a_tensor_names_it(content: bytes) -> None:
    outer, _, start = slow_reader.read_header(content)
    for name, entry in outer.items():
        if name in ('__metadata__', ':header_crc32'):
            continue
        damaged = bytearray(content)
        damaged[start + entry['data_offsets'][1] - 1] ^= 4
        with pytest.raises(PackedFileError, match=re.escape(f"tensor '{name}' of model.slope")):
            PackedFile.parse(bytes(damaged), 'model.slope')


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """A few flipped, cut, repeated, exchanged or inserted pieces."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        # Half of the time in the header, where most can go wrong.
        end = len(data) if random.random() < 0.5 else min(len(data), 4000)
        at, size = int(random.integers(0, max(end, 1))), int(random.integers(1, 65))
        kind = random.integers(0, 7)
        if kind == 0:
            data[at : at + 1] = random.bytes(1)
        elif kind == 1:
            data[at : at + size] = random.bytes(min(size, len(data) - at))
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = random.bytes(size)
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            digits = [i for i in range(at, min(at + 200, len(data))) if chr(data[i]).isdigit()]
            for i in digits[:3]:
                data[i : i + 1] = random.choice(
                    [b'9', b'0', b'-1', b'9999999999', b'null', b'1e99']
                )
        else:
            data = data[:at]
    return bytes(data)


def check_fate(data: bytes, whole: PackedWeights) -> None:
    """Refused, or read as what was written (a mutation may change nothing)."""
    try:
        weights = read(data)
    except PackedFileError as error:
        assert str(error)
        return
    assert weights.keys() == whole.keys()
    assert all(np.array_equal(weights[key], whole[key]) for key in whole)


def test_mutated_files(content: bytes) -> None:
    random, whole = np.random.default_rng(0), read(content)
    for _ in range(MUTATIONS // 4):
        check_fate(mutated(content, random), whole)


def test_mutated_files_with_right_checksums(content: bytes) -> None:
    """Behind the checksums: the header's values and the payloads, one or two of them changed.

    Nothing tells a changed code from a trained one here, so that reading may succeed; but it ends
    in weights or in a PackedFileError.
    """
    random = np.random.default_rng(1)
    for _ in range(MUTATIONS // 4):
        try:
            read(dishonest(content, random))
        except PackedFileError as error:
            assert str(error)


VALUES = [
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    10**30,
    1.5,
    1e308,
    True,
    None,
    '',
    'F64',
    'entropy',
    [],
    {},
    [1, 2],
    [2**40, 2**40],
    'bitmask',
]


def dishonest(content: bytes, random: np.random.Generator) -> bytes:
    header = slow_reader.read_header(content)[1]
    tensors = {name: array.copy() for name, array in safetensors.numpy.load(content).items()}
    for _ in range(random.integers(1, 3)):
        kind = random.integers(0, 3)
        if kind == 0:
            name = str(random.choice(sorted(set(tensors) - {':header_crc32'})))
            flat = tensors[name].reshape(-1).view(np.uint8)
            flat[random.integers(0, flat.size, 3)] = random.integers(0, 256, 3)
        elif kind == 1:
            name = str(random.choice(sorted(set(tensors) - {':header_crc32'})))
            tensors[name] = tensors[name].reshape(-1)[: random.integers(0, tensors[name].size + 1)]
        else:
            place: Any = header
            while isinstance(place, (dict, list)) and place:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = keys[random.integers(0, len(keys))]
                if not isinstance(place[key], (dict, list)) or random.random() < 0.2:
                    if key != 'crc32':
                        place[key] = VALUES[random.integers(0, len(VALUES))]
                    break
                place = place[key]
    header['crc32'] = [zlib.crc32(tensors[n].tobytes()) for n in sorted(tensors) if n[0] != ':']
    return signed(tensors, header)


# --- lies ----------------------------------------------------------------------------------------


def layer(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header['layers'][name].update(changes)


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    'a larger shape': (layer('stem', shape=[9, 3, 3, 3], kept=243), "tensor 'stem.weight'"),
    'a huge shape': (layer('stem', shape=[2**40, 2**40], kept=2**80), "tensor 'stem.weight'"),
    'a negative shape': (layer('stem', shape=[-8, 27]), "tensor 'stem.weight': its shape"),
    'a shape of texts': (layer('stem', shape=['8']), "tensor 'stem.weight': its shape"),
    'no shape': (lambda header: header['layers']['stem'].pop('shape'), "'stem.weight': its shape"),
    'no axis': (lambda header: header['layer_defaults'].pop('axis'), 'lacks its axis'),
    'defaults that are none': (
        lambda header: header.update(layer_defaults=3),
        "'layer_defaults' is",
    ),
    'another axis': (layer('conv', axis=7), "tensor 'conv.weight': its axis 7"),
    'more bits': (layer('conv', bits=5), "tensor 'conv.weight'"),
    'impossible bits': (layer('conv', bits=9), "tensor 'conv.weight': its bits are 9"),
    'bits that are true': (layer('conv', bits=True), "tensor 'conv.weight': its bits is True"),
    'more codes than bits': (layer('conv', qp=8), 'codes from -8 to 8 are not of 4 bits'),
    'other groups': (layer('conv', n=1), 'groups 1:8 along axis 1'),
    'other sizes of groups': (layer('conv', m=4, kept=432), "tensor 'conv.weight'"),
    'more kept': (layer('conv', kept=864), "tensor 'conv.weight'"),
    'a longer index': (layer('conv', index_bytes=10**9), "tensor 'conv.weight'"),
    'a negative index': (layer('conv', index_bytes=-4), "tensor 'conv.weight'"),
    'an unknown coding': (layer('conv', coding='zip'), "its coding 'zip' is unknown"),
    'an unknown dtype': (layer('up', dtype='C64'), "its dtype 'C64' is unknown"),
    'an unknown field': (layer('conv', zero_point=3), "unknown fields ['zero_point']"),
    'an offset without bound': (layer('conv', offset=1e308), 'its offset is'),
    'a broken quantizer': (layer('conv', input=[4, 2, 1.0]), 'its activation quantizer'),
    'a quantizer of a huge step': (layer('conv', input=[4, True, 1e300]), 'quantizer is [4, True'),
    'a step that is no float': (layer('conv', input=[4, True, 10**400]), 'quantizer is [4, True'),
    'a negative input step': (layer('conv', input=[4, True, -1.0]), 'quantizer is [4, True, -1.0]'),
    'more axes than arrays have': (layer('conv', shape=[8, 8, 3, 3] + [1] * 66), 'its shape [8, 8'),
    'no object': (lambda header: header['layers'].update(conv=3), 'is not an object'),
    'an unknown layer': (
        lambda header: header['layers'].update(ghost=header['layers']['conv']),
        "tensor 'ghost.weight' of a compressed layer is missing",
    ),
    'layers that are a list': (lambda header: header.update(layers=[]), "'layers' is not"),
    'a huge constant': (
        lambda header: header['constants'].update(big=['F32', [2**62, 2**62], 1.0]),
        "tensor 'big'",
    ),
    'a constant of no number': (
        lambda header: header['constants'].update(bad=['F32', [2], 'x']),
        "tensor 'bad'",
    ),
    'a constant of texts that are numbers': (
        lambda header: header['constants'].update(bad=['F32', [2], 'nan']),
        "tensor 'bad'",
    ),
    'a constant that has to be laid out': (
        lambda header: header['constants'].update(bad=['F32', [2**27, 2], [1.0, 2.0]]),
        "tensor 'bad'",
    ),
    'a constant of too many axes': (
        lambda header: header['constants'].update(bad=['F32', [1] * 70, 1.0]),
        "tensor 'bad'",
    ),
    'an alias of nothing': (
        lambda header: header.update(aliases={'a.weight': 'b.weight'}),
        "tensor 'a.weight' stands for 'b.weight'",
    ),
    'another version': (lambda header: header.update(version=3), 'format version 3'),
    'an older version': (
        lambda header: header.update(version=1),
        "tensor 'attention.in_proj_weight': the header has unknown fields ['inputs', 'key']",
    ),
    'no version': (lambda header: header.pop('version'), 'format version None'),
}


@pytest.mark.parametrize('lie', LIES)
def test_headers_that_lie(lie: str, content: bytes) -> None:
    change, part = LIES[lie]
    data = resigned(content, change)
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError) as error:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert part in str(error.value)


def test_an_unknown_code_set_or_pattern_is_refused_by_the_model(
    content: bytes, tmp_path: Path
) -> None:
    for field, value, part in (
        ('codes', 'ternary', "codes='ternary' is unknown"),
        ('codes', 'symmetric', "are not those of 'symmetric' at 4 bits"),
        ('pattern', '2:4:8', "sparsity '2:4:8' is not a pattern"),
    ):
        path = tmp_path / 'model.slope'
        path.write_bytes(resigned(content, layer('narrow', **{field: value})))
        with pytest.raises(PackedFileError, match=re.escape(part)) as error:
            load_packed(path, Net())
        assert "tensor 'narrow.weight'" in str(error.value)


def test_payloads_that_are_no_code(content: bytes) -> None:
    """Checksums are right, lengths are right, and still no encoder wrote this."""
    header = slow_reader.read_header(content)[1]
    if header['layer_defaults']['coding'] == 'entropy':
        pytest.skip('of entropy-coded streams tests/packing/test_codecs.py tells')
    tensors = {name: array.copy() for name, array in safetensors.numpy.load(content).items()}
    # 2:8 has 28 masks, and five bits count to 31.
    tensors['conv.weight'][12 * 4] = 0xFF
    header['crc32'] = [zlib.crc32(tensors[n].tobytes()) for n in sorted(tensors) if n[0] != ':']
    with pytest.raises(PackedFileError, match=r"tensor 'conv.weight': .* no 2:8 group"):
        read(signed(tensors, header))


# --- other files ---------------------------------------------------------------------------------


def test_what_is_no_packed_file(tmp_path: Path) -> None:
    folder, missing = tmp_path / 'folder', tmp_path / 'missing.slope'
    folder.mkdir()
    empty, text, tensors, torch_file = (tmp_path / name for name in 'etsp')
    empty.write_bytes(b'')
    text.write_text('a text that is longer than eight bytes')
    safetensors.numpy.save_file({'a': np.zeros(2)}, tensors)
    torch.save({'state_dict': {}}, torch_file)
    for path, part in (
        (folder, 'is a directory'),
        (missing, 'there is no packed file'),
        (empty, 'is no packed file'),
        (text, 'is no packed file'),
        (tensors, 'none of save_packed'),
        (torch_file, 'is no packed file'),
        (tmp_path / ('x' * 300), 'cannot be read'),
        (Path('/dev/null'), 'no regular file'),
    ):
        for open_it in (read_packed, lambda path: load_packed(path, nn.Linear(2, 2))):
            with pytest.raises(PackedFileError, match=part) as error:
                open_it(path)
            assert str(path) in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(PackedFileError, match='no regular file'):
        read_packed(tmp_path / 'pipe')


def test_headers_nested_without_end(content: bytes) -> None:
    deep = '[' * 100_000 + ']' * 100_000
    made = safetensors.numpy.save({'a': np.zeros(1)}, {'slope_mm': deep})
    with pytest.raises(PackedFileError, match='header of model.slope is damaged'):
        PackedFile.parse(made, 'model.slope')
