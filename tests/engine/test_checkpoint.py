"""The checkpoint reader: all that a real Runner writes, bad files, downloads and names."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import pickle
import re
import tarfile
import threading
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import tiny
import torch
from checkpoint_runs import Net, make_runner, spread, unsafe
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.runner import CheckpointLoader
from pickle_gadgets import (
    SYSTEM,
    Call,
    appears,
    read_pickle,
    touch,
    unicode,
    write_gadget,
    write_pickle,
)
from torch import nn

from slope_mm.engine import checkpoint
from slope_mm.engine.checkpoint import CheckpointNotFoundError, load_checkpoint_file
from slope_mm.environment import version_table
from slope_mm.errors import CheckpointError

pytestmark = pytest.mark.usefixtures('installed')

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])


# --- a real Runner -------------------------------------------------------------------------------


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


def test_runner_checkpoint_equals_the_unsafe_load(trained: Path) -> None:
    ours, theirs = load_checkpoint_file(trained), unsafe(trained)
    assert {'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'} <= set(theirs)
    assert_same(ours, theirs)
    assert ours['message_hub']['log_scalars']['train/loss'].statistics('mean') > 0


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason='older torch runs whatever the file asks for')
@pytest.mark.skipif('onedl' in version_table(), reason='the fork has mended it')
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
    with pytest.raises(CheckpointError, match=rf"'{spread.__module__}\.spread'"):
        load_checkpoint_file(tmp_path / 'spread.pth')


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


@pytest.mark.skipif(tiny.HAS_CUDA, reason='the device is here')
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


def test_a_path_in_the_home_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'own.pth').write_bytes(trained.read_bytes())
    monkeypatch.setenv('HOME', str(tmp_path))
    assert_same(load_checkpoint_file('~/own.pth'), unsafe(trained))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is a directory; name the checkpoint file'):
        load_checkpoint_file(tmp_path)


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', pickle.dumps({'a': 1})])
def test_file_that_torch_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r'a\.pth .*is neither a file of torch\.save nor a packed'
    ):
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


def test_a_urls_query_is_no_part_of_the_files_name(
    served: tuple[Path, str], trained: Path, tmp_path: Path
) -> None:
    folder, url = served
    (folder / 'good.pth').write_bytes(trained.read_bytes())
    kept = tmp_path / 'kept'
    checkpoint.load_from_http(f'{url}/good.pth?raw=true', model_dir=str(kept))
    assert [path.name for path in kept.iterdir()] == ['good.pth']


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
