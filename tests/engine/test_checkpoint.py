"""The checkpoint reader: all that a real Runner writes, and nothing that a pickle could run."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import http.server
import importlib
import io
import json
import operator
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OneCycleLR
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from torch import nn

from slope_mm.engine import checkpoint
from slope_mm.engine.checkpoint import CheckpointNotFoundError, load_checkpoint_file
from slope_mm.errors import CheckpointError

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ('TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
        monkeypatch.delenv(variable, raising=False)
    checkpoint.install()


# --- a real Runner -------------------------------------------------------------------------------


class Net(BaseModel):
    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 1)

    def forward(self, image: list[torch.Tensor], mode: str = 'tensor') -> Any:
        out = self.head(self.norm(self.conv(torch.stack(list(image)))).mean((2, 3)))
        return {'loss': out.square().mean()} if mode == 'loss' else out


class Images(torch.utils.data.Dataset):
    metainfo = {
        'classes': ('disc', 'square'),
        'palette': [(1, 2, 3), (4, 5, 6)],
        'keypoints': ConfigDict(left={'id': 0, 'swap': 'right'}, sizes=[1, 2]),
        'sigmas': np.arange(3, dtype=np.float32),
        'scale': np.float64(0.5),
    }

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(index)
        return {'image': torch.randn(1, 5, 5, generator=noise)}


def make_runner(work_dir: Path, iterations: int, **options: Any) -> Runner:
    torch.manual_seed(0)
    runner = Runner(
        model=Net(),
        work_dir=str(work_dir),
        train_dataloader={
            'batch_size': 2,
            'num_workers': 0,
            'dataset': Images(),
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        },
        train_cfg={'by_epoch': False, 'max_iters': iterations},
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler=[
            {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.5, 'end': 3},
            {'type': 'MultiStepLR', 'by_epoch': False, 'milestones': [1, 3]},
        ],
        default_hooks={
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 2},
        },
        custom_hooks=[{'type': 'EMAHook', 'momentum': 0.1}],
        default_scope='mmengine',
        experiment_name=f'checkpoint_{uuid4().hex}',
        log_level='ERROR',
        **options,
    )
    torch.manual_seed(0)
    nn.init.normal_(runner.model.conv.weight)
    return runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two iterations of training; iter_4.pth beside it after four."""
    work_dir = tmp_path_factory.mktemp('trained')
    make_runner(work_dir, 4).train()
    return work_dir / 'iter_2.pth'


def assert_same(ours: Any, theirs: Any, where: str = '') -> None:
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.device, ours.stride()) == (
            theirs.dtype,
            theirs.device,
            theirs.stride(),
        ), where
        assert ours.requires_grad == theirs.requires_grad, where
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, (np.ndarray, np.generic)):
        assert ours.dtype == theirs.dtype, where
        np.testing.assert_array_equal(ours, theirs, where)
    elif isinstance(theirs, HistoryBuffer):
        assert_same(vars(ours), vars(theirs), where)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
        if type(theirs) is OrderedDict:
            assert_same(vars(ours), vars(theirs), f'{where} attributes')
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f'{where}[{i}]')
    else:
        assert ours == theirs, where


def unsafe(path: Path) -> Any:
    return torch.load(path, map_location='cpu', weights_only=False)


def test_runner_checkpoint_equals_the_unsafe_load(trained: Path) -> None:
    ours, theirs = load_checkpoint_file(trained), unsafe(trained)
    assert {'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'} <= set(theirs)
    assert_same(ours, theirs)
    assert ours['message_hub']['log_scalars']['train/loss'].statistics('mean') > 0


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason='older torch runs whatever the file asks for')
def test_mmengine_alone_cannot_read_its_own_checkpoint(trained: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
        mmengine_checkpoint.load_from_local(str(trained), 'cpu')


def test_resumed_run_ends_like_the_uninterrupted_one(trained: Path, tmp_path: Path) -> None:
    resumed = make_runner(tmp_path, 4, load_from=str(trained), resume=True)
    resumed.train()
    assert resumed.iter == 4
    whole = load_checkpoint_file(trained.with_name('iter_4.pth'))
    again = load_checkpoint_file(tmp_path / 'iter_4.pth')
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert_same(again[part], whole[part], part)
    losses = [c['message_hub']['log_scalars']['train/loss'].data[0] for c in (again, whole)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize('curve', ['cos', 'linear'])
def test_one_cycle_scheduler(tmp_path: Path, curve: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, eta_max=0.1, total_steps=8, anneal_strategy=curve)
    for protocol in (2, 4):
        torch.save(scheduler.state_dict(), tmp_path / 'a.pth', pickle_protocol=protocol)
        ours = load_checkpoint_file(tmp_path / 'a.pth')
        assert_same(ours, unsafe(tmp_path / 'a.pth'))
        assert ours['anneal_func'](0.0, 1.0, 0.5) == pytest.approx(0.5)


def test_load_from_and_pretrained(trained: Path, tmp_path: Path) -> None:
    weight = unsafe(trained)['state_dict']['conv.weight']
    runner = make_runner(tmp_path, 2, load_from=str(trained))
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert torch.equal(runner.model.conv.weight, weight)
    model = Net(init_cfg={'type': 'Pretrained', 'checkpoint': str(trained)})
    model.init_weights()
    assert torch.equal(model.conv.weight, weight)


def test_statistics_that_the_program_registered(tmp_path: Path) -> None:
    assert HistoryBuffer([1], [1]).statistics('mean') == 1  # fills the table of the class
    HistoryBuffer.register_statistics(spread)
    try:
        torch.save(HistoryBuffer([1, 3], [1, 1]), tmp_path / 'spread.pth')
        assert load_checkpoint_file(tmp_path / 'spread.pth').statistics('spread') == 2
    finally:
        del HistoryBuffer._statistics_methods['spread']
    with pytest.raises(CheckpointError, match=rf"'{__name__}\.spread'"):
        load_checkpoint_file(tmp_path / 'spread.pth')


def spread(buffer: HistoryBuffer) -> float:
    return buffer.max() - buffer.min()


# --- what else plain data may be -----------------------------------------------------------------


def plain_data() -> dict[str, Any]:
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool)
    shared = torch.arange(12.0)
    return {
        'state_dict': state,
        'tensors': [torch.ones(2, 3).to(dtype) for dtype in dtypes],
        'views': [shared[2:], shared.view(3, 4).t(), torch.zeros(0, 3), torch.tensor(1.5)],
        'complex': torch.tensor([1 + 2j]),
        'parameter': nn.Parameter(torch.ones(3)),
        'torch': [torch.Size([1, 2]), torch.device('cpu'), torch.bfloat16],
        'containers': [{1, 2}, frozenset({3}), (1,), [], {}, Counter('aab')],
        'default': defaultdict(list, {1: [2]}),
        'bytes': [b'', b'a\xff', bytearray(b'b')],
        'numbers': [True, None, -1, 2**40, 10**30, 1e300, 1 + 2j, slice(1, 2), range(3)],
        'arrays': [
            np.arange(6.0).reshape(2, 3)[:, ::-1],
            np.asfortranarray(np.ones((2, 3))),
            np.arange(3, dtype='>i4'),
            np.array(['ab', 'c']),
            np.array([b'ab']),
            np.zeros((0, 2), dtype=bool),
        ],
        'scalars': [np.float32(2), np.int64(-3), np.bool_(True), np.str_('text')],
        'dtype': np.dtype('f4'),
        'long': list(range(3000)),
    }


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_plain_data_in_both_formats(tmp_path: Path, new_format: bool, protocol: int) -> None:
    path = tmp_path / 'plain.pth'
    torch.save(
        plain_data(),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=new_format,
    )
    ours = load_checkpoint_file(path)
    assert_same(ours, unsafe(path))
    first, second = ours['views'][:2]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_arrays_of_numpy_1_and_2(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    content = {'array': np.arange(3.0), 'scalar': np.float32(2)}
    torch.save(content, path)
    written = read_pickle(path)
    for module in (b'numpy.core.', b'numpy._core.'):
        write_pickle(path, re.sub(rb'numpy\._?core\.', module, written))
        assert_same(load_checkpoint_file(path), content)


def test_map_location(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(2)}, path)
    seen = []

    def keep(storage: Any, location: str) -> Any:
        seen.append(location)
        return storage

    for location in (keep, None, {'cpu': 'cpu'}, torch.device('cpu')):
        assert load_checkpoint_file(path, location)['a'].device.type == 'cpu'
    assert seen == ['cpu']
    assert load_checkpoint_file(path, 'meta')['a'].device.type == 'meta'
    assert CheckpointLoader.load_checkpoint(str(path), 'meta')['a'].device.type == 'meta'


@pytest.mark.skipif(torch.cuda.is_available(), reason='the device is here')
def test_tensors_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    path = tmp_path / 'cuda.pth'
    torch.save({'a': torch.ones(2)}, path)
    text = read_pickle(path).replace(unicode('cpu'), unicode('cuda:0'))
    write_pickle(path, text)
    assert load_checkpoint_file(path)['a'].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="give map_location='cpu'"):
        load_checkpoint_file(path, None)


@pytest.mark.parametrize('variable', ['', 'NO_'])
def test_environment_variables(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(f'TORCH_FORCE_{variable}WEIGHTS_ONLY_LOAD', '1')
    torch.save({'a': torch.ones(2)}, tmp_path / 'plain.pth')
    torch.save(Call(os.system, 'true'), tmp_path / 'gadget.pth')
    assert load_checkpoint_file(tmp_path / 'plain.pth')['a'].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=SYSTEM):
        load_checkpoint_file(tmp_path / 'gadget.pth')
    if variable:
        assert 'message_hub' in load_checkpoint_file(trained)
    else:
        with pytest.raises(CheckpointError, match='unset TORCH_FORCE_WEIGHTS_ONLY_LOAD'):
            load_checkpoint_file(trained)


# --- pickles by hand: torch.save writes no opcode that a good file lacks -------------------------


def unicode(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text.encode())) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return f'c{module}\n{attribute}\n'.encode()


def group(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b'R'


def program(*opcodes: bytes) -> bytes:
    return b'\x80\x02' + b''.join(opcodes) + b'.'


HISTORY = name('mmengine.logging.history_buffer', 'HistoryBuffer')
GETATTR = name('__builtin__', 'getattr')
ORDERED = name('collections', 'OrderedDict') + b')R'
FLOATS = call(name('numpy', 'dtype'), unicode('f8'), b'\x89', b'\x88')


def read_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith('/data.pkl')))


def write_pickle(path: Path, data: bytes) -> None:
    """Puts ``data`` in place of the pickle of a zip checkpoint."""
    with zipfile.ZipFile(path) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for record, content in records.items():
            archive.writestr(record, data if record.endswith('/data.pkl') else content)


# --- gadgets: each would leave a marker file -----------------------------------------------------


class Call:
    """Pickles as ``function(*arguments)``, and as ``BUILD state`` of its result."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class Stateful:
    """Leaves its marker when its state is set."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __getstate__(self) -> dict[str, str]:
        return {'marker': str(self.marker)}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state['marker']).touch()


MODULE = 'slope_gadget_module'  # leaves the marker when it is imported


def touch(marker: Path) -> Call:
    return Call(os.system, f'touch {marker}')


def code(marker: Path) -> str:
    return f'open({str(marker)!r}, "w").close()'


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


SYSTEM = f'{os.system.__module__}.system'
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
    '__setstate__': (Stateful, f'{__name__}.Stateful'),
    'INST': (
        lambda m: program(b'(' + unicode(f'touch {m}') + b'ios\nsystem\n'),
        'os.system',
    ),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    marker = tmp_path / 'marker'
    (tmp_path / f'{MODULE}.py').write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    statistics = dict(HistoryBuffer._statistics_methods)
    yield marker
    HistoryBuffer._statistics_methods.clear()
    HistoryBuffer._statistics_methods.update(statistics)


def write_gadget(path: Path, gadget: Any, legacy: bool = False) -> None:
    if isinstance(gadget, bytes):
        torch.save({}, path)
        write_pickle(path, gadget)
    else:
        content = {'state_dict': {'w': torch.ones(2)}, 'more': gadget}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def appears(marker: Path) -> bool:
    for _ in range(200):  # a process may need a moment
        if marker.exists():
            return True
        time.sleep(0.02)
    return False


BY_HAND = ('a name whose module runs', 'getattr chain', 'INST')  # torch.save writes none of these


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


# --- files that are no checkpoints ---------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / 'epoch_12.pth').touch()
    with pytest.raises(
        CheckpointError, match=r"does not exist.*nearest: 'epoch_12\.pth'"
    ) as caught:
        load_checkpoint_file(tmp_path / 'epoch_13.pth')
    assert isinstance(caught.value, CheckpointNotFoundError)
    with pytest.raises(FileNotFoundError):  # what mmengine's own loader raises
        CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_13.pth'))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is a directory; name the checkpoint file'):
        load_checkpoint_file(tmp_path)


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', pickle.dumps({'a': 1})])
def test_file_that_torch_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'a\.pth .*is no file of torch\.save'):
        load_checkpoint_file(tmp_path / 'a.pth')


@pytest.mark.parametrize('keep', [0.3, 0.9])
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_truncated_file(tmp_path: Path, new_format: bool, keep: float) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(1000)}, path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match='damaged or incomplete'):
        load_checkpoint_file(path)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('a/readme.txt', 'text')
    with pytest.raises(CheckpointError, match='cannot be read as a checkpoint'):
        load_checkpoint_file(tmp_path / 'a.pth')


@pytest.mark.filterwarnings('ignore')
def test_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match='TorchScript'):
        load_checkpoint_file(tmp_path / 'a.pth')


def test_tar_archive_is_not_unpacked(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / 'a.pth'
    data = pickle.dumps(touch(marker), protocol=2)
    with tarfile.open(path, 'w') as archive:
        # A member name with torch's magic number in it, so that the file looks like torch's.
        for member in ('\udc80' + 'l\udcfc\udc9cF\udcf9 j\udca8P\x19', 'storages'):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(CheckpointError):
        load_checkpoint_file(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        unsafe(path)
    assert appears(marker), 'torch did not try its tar reader: this test proves nothing'


# --- downloads and names -------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the URL that it is served at."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        thread.join()


def test_url(served: tuple[Path, str], trained: Path, marker: Path) -> None:
    folder, url = served
    (folder / 'good.pth').write_bytes(trained.read_bytes())
    write_gadget(folder / 'bad.pth', touch(marker))
    # What torchvision:// and mmcls:// call in mmengine's module is covered with it.
    for load in (CheckpointLoader.load_checkpoint, mmengine_checkpoint.load_from_http):
        assert_same(load(f'{url}/good.pth'), unsafe(trained))
        with pytest.raises(CheckpointError, match=SYSTEM):
            load(f'{url}/bad.pth')
    (folder / 'good.pth').unlink()
    assert 'meta' in CheckpointLoader.load_checkpoint(f'{url}/good.pth')  # kept
    with pytest.raises(CheckpointError, match=r'none\.pth could not be downloaded.*404'):
        CheckpointLoader.load_checkpoint(f'{url}/none.pth')
    assert not marker.exists()


def test_openmmlab_names(
    served: tuple[Path, str], tmp_path: Path, trained: Path, marker: Path
) -> None:
    folder, url = served
    home = tmp_path / 'mmengine'
    home.mkdir()
    write_gadget(home / 'bad.pth', touch(marker))
    (folder / 'good.pth').write_bytes(trained.read_bytes())
    places = {'slope_bad': 'bad.pth', 'slope_good': f'{url}/good.pth'}
    (home / 'open_mmlab.json').write_text(json.dumps(places))
    assert 'meta' in CheckpointLoader.load_checkpoint('open-mmlab://slope_good')
    with pytest.raises(CheckpointError, match=SYSTEM):
        CheckpointLoader.load_checkpoint('openmmlab://slope_bad')
    with pytest.raises(CheckpointError, match="nearest: 'slope_good'"):
        CheckpointLoader.load_checkpoint('open-mmlab://slope_goods')
    assert not marker.exists()


def test_install_twice_and_keeps_other_schemes(trained: Path) -> None:
    before = dict(CheckpointLoader._schemes)
    checkpoint.install()
    assert dict(CheckpointLoader._schemes) == before
    assert before[''] is checkpoint.load_from_local
    assert {'pavi://', 'mmcls://', 'torchvision://'} <= set(before)
    assert 'meta' in CheckpointLoader.load_checkpoint(str(trained))
