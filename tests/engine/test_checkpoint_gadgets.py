"""The checkpoint reader runs nothing that a pickle asks for, and says what it asked."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import Net, make_runner, spread, unsafe
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from pickle_gadgets import (
    MODULE,
    SYSTEM,
    Call,
    appears,
    call,
    code,
    group,
    name,
    program,
    read_pickle,
    touch,
    unicode,
    write_gadget,
    write_pickle,
)

from slope_mm.engine import checkpoint
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.errors import CheckpointError

pytestmark = pytest.mark.usefixtures('installed')


HISTORY = name('mmengine.logging.history_buffer', 'HistoryBuffer')
GETATTR = name('__builtin__', 'getattr')
RANGE = name('__builtin__', 'range')
ORDERED = name('collections', 'OrderedDict') + b')R'
FLOATS = call(name('numpy', 'dtype'), unicode('f8'), b'\x89', b'\x88')


class Stateful:
    """Leaves its marker when its state is set."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __getstate__(self) -> dict[str, str]:
        return {'marker': str(self.marker)}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state['marker']).touch()


def saved(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def array_file(marker: Path) -> Call:
    path = marker.with_suffix('.npy')
    np.save(path, np.array([touch(marker)], dtype=object), allow_pickle=True)
    return Call(np.load, str(path), None, True)


def getattr_chain(marker: Path) -> bytes:
    """HistoryBuffer.__init__.__globals__['__builtins__']['exec'](code): no name but getattr's."""
    module = call(GETATTR, call(GETATTR, HISTORY, unicode('__init__')), unicode('__globals__'))
    builtins = call(call(GETATTR, module, unicode('get')), unicode('__builtins__'))
    execute = call(call(GETATTR, builtins, unicode('get')), unicode('exec'))
    return program(call(execute, unicode(code(marker))))


SCALAR = np.float64(1).__reduce__()[0]
# What the gadget is: what torch.save is given, or the bytes of a pickle; the name in the error.
GADGETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'os.system': (touch, SYSTEM),
    'eval': (lambda m: Call(eval, code(m)), 'builtins.eval'),
    'exec': (lambda m: Call(exec, code(m)), 'builtins.exec'),
    'Popen': (lambda m: Call(subprocess.Popen, ['touch', str(m)]), 'subprocess.Popen'),
    'import_module': (
        lambda m: Call(importlib.import_module, MODULE),
        'importlib.import_module',
    ),
    'a name whose module runs': (lambda m: program(name(MODULE, 'x')), f'{MODULE}.x'),
    'getattr chain': (getattr_chain, f'builtins.getattr({HistoryBuffer.__module__}.HistoryBuffer'),
    'nested reducers': (lambda m: Call(OrderedDict, [('a', [touch(m)])]), SYSTEM),
    'class and state': (
        lambda m: Call(functools.partial(os.system, f'touch {m}')),
        'functools.partial',
    ),
    'attrgetter': (
        lambda m: [Call(operator.attrgetter('__globals__'), spread), touch(m)],
        'operator.attrgetter',
    ),
    '_load_from_bytes': (
        lambda m: Call(torch.storage._load_from_bytes, saved(touch(m))),
        'torch.storage._load_from_bytes',
    ),
    'object array': (lambda m: np.array([touch(m)], dtype=object), "numpy.dtype('O"),
    'object scalar': (lambda m: Call(SCALAR, np.dtype('O'), touch(m)), "numpy.dtype('O"),
    'numpy.load': (array_file, 'numpy.load'),
    'copyreg': (
        lambda m: Call(
            copyreg._reconstructor, Stateful, object, None, state=Stateful(m).__getstate__()
        ),
        'copyreg._reconstructor',
    ),
    'pickle.loads': (
        lambda m: Call(pickle.loads, pickle.dumps(touch(m))),
        'pickle.loads',
    ),
    '__import__': (lambda m: Call(__import__, MODULE), 'builtins.__import__'),
    'open': (lambda m: Call(open, str(m), 'w'), 'io.open'),
    'runpy': (
        lambda m: Call(runpy.run_path, str(m.with_name(f'{MODULE}.py'))),
        'runpy.run_path',
    ),
    'runstring': (
        lambda m: Call(np.testing.runstring, code(m), {}),
        '.runstring',
    ),
    'a code object': (
        lambda m: program(
            call(
                call(
                    name('types', 'FunctionType'),
                    call(name('__builtin__', 'compile'), *map(unicode, (code(m), 'a', 'exec'))),
                    b'}',
                )
            )
        ),
        'types.FunctionType',
    ),
    'reduce and map': (
        lambda m: Call(list, Call(map, os.system, [f'touch {m}'])),
        'builtins.map',
    ),
    '__setstate__': (Stateful, f'{__name__}.Stateful'),
    'INST': (
        lambda m: program(b'(' + unicode(f'touch {m}') + b'ios\nsystem\n'),
        'os.system',
    ),
}
BY_HAND = (
    'a name whose module runs',
    'getattr chain',
    'a code object',
    'INST',
)  # torch.save writes none of these


@pytest.mark.parametrize(
    ('kind', 'legacy'),
    [
        pytest.param(kind, legacy, id=f'{kind}-{"legacy" if legacy else "zip"}')
        for kind in GADGETS
        for legacy in (False, True)
        if not (legacy and kind in BY_HAND)
    ],
)
def test_gadget_is_named_and_not_run(kind: str, legacy: bool, marker: Path) -> None:
    make, what = GADGETS[kind]
    path = marker.with_suffix('.pth')
    write_gadget(path, make(marker), legacy)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_file(path)
    assert str(caught.value).startswith(f'{path} asks to run')
    assert what in str(caught.value)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        unsafe(path)
    assert appears(marker), 'the gadget does nothing: this test proves nothing'


def test_gadget_in_the_message_hub_of_a_good_checkpoint(trained: Path, marker: Path) -> None:
    content = unsafe(trained)
    content['message_hub']['runtime_info']['note'] = touch(marker)
    path = marker.with_suffix('.pth')
    torch.save(content, path)
    model = Net()
    before = model.conv.weight.clone()
    for read in (
        lambda: load_checkpoint_file(path),
        lambda: CheckpointLoader.load_checkpoint(str(path)),
        lambda: load_checkpoint(model, str(path), map_location='cpu'),
        lambda: make_runner(marker.parent, 4, load_from=str(path)).train(),
        lambda: make_runner(marker.parent, 4, load_from=str(path), resume=True).train(),
        lambda: Net(init_cfg={'type': 'Pretrained', 'checkpoint': str(path)}).init_weights(),
        lambda: checkpoint.load_from_ceph(str(path), backend='local'),
    ):
        with pytest.raises(CheckpointError, match=SYSTEM):
            read()
    assert torch.equal(model.conv.weight, before)
    assert not marker.exists()


def test_resume_runs_no_config_of_the_checkpoint(trained: Path, marker: Path) -> None:
    content = unsafe(trained)
    content['meta']['config'] = code(marker)
    path = marker.with_suffix('.pth')
    torch.save(content, path)
    make_runner(marker.parent / 'resumed', 4, load_from=str(path), resume=True).train()
    assert not marker.exists()
    with contextlib.suppress(Exception):
        Config.fromstring(content['meta']['config'], file_format='.py')  # as Runner.resume does
    assert appears(marker)


def test_gadget_in_the_extension_registry(marker: Path) -> None:
    path = marker.with_suffix('.pth')
    write_gadget(path, program(call(b'\x82\xf0', unicode(f'touch {marker}'))))
    copyreg.add_extension(os.system.__module__, 'system', 0xF0)
    try:
        with pytest.raises(CheckpointError, match='pickle opcode EXT1'):
            load_checkpoint_file(path)
        assert not marker.exists()
        with contextlib.suppress(Exception):
            unsafe(path)
        assert appears(marker)
    finally:
        copyreg.remove_extension(os.system.__module__, 'system', 0xF0)
        copyreg.clear_extension_cache()


def test_gadget_in_the_header_of_the_legacy_format(marker: Path) -> None:
    path = marker.with_suffix('.pth')
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    path.write_bytes(magic + pickle.dumps(touch(marker), protocol=2))
    with pytest.raises(CheckpointError, match=SYSTEM):
        load_checkpoint_file(path)
    assert not marker.exists()


REBUILD = name('torch._utils', '_rebuild_tensor_v2')
FLOAT_STATE = [b'K\x03', unicode('<'), b'N', b'N', b'N', b'J\xff\xff\xff\xff', b'J\xff\xff\xff\xff']
# Admitted names put to other uses than their own, and doors back into torch.load.
MISUSES = {
    'torch.load again': (
        program(call(name('torch.serialization', 'load'), unicode('a.pth'))),
        'torch.serialization.load',
    ),
    'a statistic of all history buffers': (
        program(
            HISTORY,
            b')\x81}',
            unicode('statistics_methods'),
            b'}',
            unicode('mean'),
            name('__builtin__', 'exec'),
            b'ssb',
        ),
        'builtins.exec',
    ),
    'attributes of a function': (
        program(REBUILD, group(b'N', b'}' + unicode('__defaults__') + b')s'), b'b'),
        '__setstate__',
    ),
    'attributes of a class': (
        program(HISTORY, group(b'N', b'}' + unicode('mean') + b'K\x01s'), b'b'),
        '__setstate__',
    ),
    'attributes of a history buffer': (
        program(HISTORY, b')\x81}', unicode('__class__'), b'K\x01sb'),
        'HistoryBuffer.__setstate__',
    ),
    'methods of a state dict': (
        program(ORDERED, b'}', unicode('copy'), b'K\x01sb'),
        'OrderedDict.__setstate__',
    ),
    'a call of what a call returned': (
        program(call(call(GETATTR, HISTORY, unicode('min')))),
        'a call of function',
    ),
    'a foreign attribute': (
        program(call(GETATTR, ORDERED, unicode('__class__'))),
        "builtins.getattr(OrderedDict, '__class__')",
    ),
    'a default factory': (
        program(call(name('collections', 'defaultdict'), HISTORY)),
        'collections.defaultdict',
    ),
    'flags of a dtype': (
        program(FLOATS, group(*FLOAT_STATE, b'K\x01'), b'b'),
        'numpy.dtype.__setstate__',
    ),
    'a record dtype': (
        program(call(name('numpy', 'dtype'), unicode('V8'), b'\x89', b'\x88')),
        "numpy.dtype('V8')",
    ),
    'an array of other type': (
        program(call(name('numpy.core.multiarray', '_reconstruct'), HISTORY, b'K\x00\x85', b'N')),
        'an array of type',
    ),
    'a tensor without a storage': (
        program(call(REBUILD, b'N', b'K\x00', b')', b')', b'\x89', ORDERED)),
        'a tensor over NoneType',
    ),
    'a persistent id of a class': (
        program(group(unicode('module'), HISTORY, unicode('f'), unicode('s')), b'Q'),
        'a persistent id',
    ),
    'memory without end': (
        program(
            call(name('__builtin__', 'bytearray'), b'\x8a\x06' + (1 << 40).to_bytes(6, 'little'))
        ),
        'builtins.bytearray',
    ),
    **{
        f'{word} of a range': (
            program(
                call(name(module, word), call(name('__builtin__', 'range'), b'J\xff\xff\xff\x7f'))
            ),
            f'{word}(range)',
        )
        for module, word in (
            ('__builtin__', 'set'),
            ('__builtin__', 'frozenset'),
            ('collections', 'Counter'),
            ('torch', 'Size'),
        )
    },
    'append to another type': (program(ORDERED, b'K\x01a'), 'OrderedDict.extend'),
    'items of another type': (program(HISTORY, b')\x81', b'K\x01K\x01s'), '__setitem__'),
    'a name of Python 2': (program(name('commands', 'getoutput')), 'subprocess.getoutput'),
    'a forged name': (program(name('torch.FloatStorage', 'load')), 'torch.FloatStorage.load'),
}


@pytest.mark.parametrize('kind', MISUSES)
def test_admitted_names_do_only_what_they_are_for(kind: str, tmp_path: Path) -> None:
    data, what = MISUSES[kind]
    torch.save({}, tmp_path / 'misuse.pth')
    write_pickle(tmp_path / 'misuse.pth', data)
    rebuild = torch._utils._rebuild_tensor_v2
    before = (rebuild.__defaults__, dict(vars(HistoryBuffer)))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_file(tmp_path / 'misuse.pth')
    assert 'asks to run' in str(caught.value)
    assert what in str(caught.value)
    assert (rebuild.__defaults__, dict(vars(HistoryBuffer))) == before


def test_backward_hooks_are_refused(tmp_path: Path) -> None:
    torch.save({'a': torch.ones(2)}, tmp_path / 'hooks.pth')
    data = read_pickle(tmp_path / 'hooks.pth')
    hooks = data.index(b'ccollections\nOrderedDict\n')
    write_pickle(tmp_path / 'hooks.pth', data[:hooks] + b'}K\x00K\x01s0' + data[hooks:])
    assert load_checkpoint_file(tmp_path / 'hooks.pth')['a'].tolist() == [1, 1]  # popped: unused
    end = data.index(b')R', hooks)
    write_pickle(tmp_path / 'hooks.pth', data[:hooks] + b'}K\x00K\x01s' + data[end + 2 :])
    with pytest.raises(CheckpointError, match='_backward_hooks'):
        load_checkpoint_file(tmp_path / 'hooks.pth')


def test_a_checkpoint_cannot_change_the_statistics_of_all_buffers(tmp_path: Path) -> None:
    minimum = call(GETATTR, HISTORY, unicode('min'))
    state = b'}' + unicode('statistics_methods') + b'}' + unicode('mean') + minimum + b'ss'
    torch.save({}, tmp_path / 'a.pth')
    write_pickle(tmp_path / 'a.pth', program(HISTORY, b')\x81', state, b'b'))
    load_checkpoint_file(tmp_path / 'a.pth')
    assert HistoryBuffer([1, 3], [1, 1]).statistics('mean') == 2
