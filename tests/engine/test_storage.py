"""Checkpoints are complete or not there: killed writers, full disks, pointers that are cut off."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine
import pytest
import tiny
import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, save_checkpoint

from slope_mm import StorageError, TensorError
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.hooks.checkpoint import SlopeCheckpointHook
from slope_mm.engine.storage import latest_checkpoint
from slope_mm.wholefile import remove_partials, write_whole


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """The kernel's limit on a file's length stands in for the disk's end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- one file ------------------------------------------------------------------------------------


def in_a_child(function: Callable[[], Any]) -> int:
    """Runs a function in a fork, without a way back into the tests; returns the exit status."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize('size', [0, 1, 4096, 99_999])
def test_a_writer_that_dies_at_any_byte_leaves_the_older_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'older')

    def die() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with longest_file(size):
            mmengine.fileio.put(bytes(100_000), path)

    assert in_a_child(die) == -signal.SIGXFSZ
    left = contents(tmp_path)
    assert left.pop('epoch_1.pth') == b'older'
    # What it had written is the temporary file.
    assert [len(content) for content in left.values()] == [size]
    assert remove_partials(tmp_path, '*.pth') == list(left)
    assert contents(tmp_path) == {'epoch_1.pth': b'older'}


def test_only_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    partials = ['.epoch_1.pth.0123abcd.part', '.best.pth.ffffffff.part']
    others = ['epoch_1.pth', '.epoch_1.pth.part', 'a.part', '.notes.txt.0123abcd.part']
    for name in partials + others:
        (tmp_path / name).touch()
    assert remove_partials(tmp_path, '*.pth') == sorted(partials)
    assert set(contents(tmp_path)) == set(others)
    assert remove_partials(tmp_path / 'nowhere') == []


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / 'there').mkdir()
    link, real = tmp_path / 'link.pth', tmp_path / 'there' / 'real.pth'
    real.touch()
    link.symlink_to(real)
    write_whole(link, b'new')
    assert link.is_symlink()
    assert real.read_bytes() == b'new'
    write_whole('/dev/null', b'gone')
    assert not Path('/dev/null').is_file()


def test_mmengine_writes_whole_files_and_says_what_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'folder' / 'a.json'
    mmengine.dump({'a': 'ä'}, path)
    assert mmengine.load(path) == {'a': 'ä'}
    older = contents(path.parent)
    with longest_file(4), pytest.raises(StorageError, match=r'a.json.*File too large.*unchanged'):
        mmengine.dump({'a': 'b' * 99}, path)
    assert contents(path.parent) == older
    with pytest.raises(StorageError, match='cannot be written'):
        save_checkpoint({'a': 1}, str(path / 'epoch_1.pth'))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write to read-only folders')
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match='Permission denied'):
        save_checkpoint({'a': 1}, str(tmp_path / 'epoch_1.pth'))
    tmp_path.chmod(0o700)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of memory, with options."""
    folder = tmp_path / 'mounted'
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder])
        if done.returncode:
            pytest.skip('mounting a file system is not allowed here')
        return folder

    yield mount
    subprocess.run(['umount', folder], capture_output=True)


def test_a_disk_that_is_full_or_read_only(mounted: Callable[[str], Path]) -> None:
    folder = mounted('size=64k')
    path = folder / 'epoch_1.pth'
    save_checkpoint({'a': torch.ones(4)}, str(path))
    older = contents(folder)
    with pytest.raises(StorageError, match='No space left on device'):
        save_checkpoint({'a': torch.ones(99_999)}, str(path))
    assert contents(folder) == older
    mounted('remount,ro')
    with pytest.raises(StorageError, match='Read-only file system'):
        save_checkpoint({'a': torch.zeros(4)}, str(path))
    assert contents(folder) == older


# --- the newest checkpoint -----------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run with iter_1.pth, iter_2.pth and a pointer to the latter."""
    work_dir = tmp_path_factory.mktemp('toy')
    tiny.train(tiny.toy_config(work_dir, default_hooks__checkpoint__interval=1))
    return work_dir


@pytest.fixture
def run(two_epochs: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for name in ('iter_1.pth', 'iter_2.pth'):
        (tmp_path / name).write_bytes((two_epochs / name).read_bytes())
        os.utime(tmp_path / name, (1000 + int(name[5]), 1000 + int(name[5])))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    return tmp_path


def test_a_checkpoint_may_be_a_folder(run: Path) -> None:
    """As DeepSpeed writes it."""
    (run / 'iter_3.pth').mkdir()
    (run / 'last_checkpoint').write_text(str(run / 'iter_3.pth'))
    assert latest_checkpoint(str(run)) == str(run / 'iter_3.pth')


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    'nothing': (lambda run: None, 'iter_2.pth'),
    'an older pointer': (
        lambda run: (run / 'last_checkpoint').write_text(str(run / 'iter_1.pth')),
        'iter_1.pth',
    ),
    'an empty pointer': (lambda run: cut(run / 'last_checkpoint', 0), 'iter_2.pth'),
    'half a pointer': (lambda run: cut(run / 'last_checkpoint', 0.5), 'iter_2.pth'),
    'bytes for a pointer': (
        lambda run: (run / 'last_checkpoint').write_bytes(b'\x00\xff' * 20),
        'iter_2.pth',
    ),
    'no pointer': (lambda run: (run / 'last_checkpoint').unlink(), 'iter_2.pth'),
    'half a checkpoint': (lambda run: cut(run / 'iter_2.pth', 0.5), 'iter_1.pth'),
    'a checkpoint without its end': (lambda run: cut(run / 'iter_2.pth', 0.99), 'iter_1.pth'),
    'a checkpoint that is gone': (lambda run: (run / 'iter_2.pth').unlink(), 'iter_1.pth'),
    'a newer one without an optimizer': (
        lambda run: (
            torch.save({'meta': {}, 'state_dict': {}}, run / 'best.pth'),
            cut(run / 'last_checkpoint', 0),
        ),
        'iter_2.pth',
    ),
    'no checkpoint at all': (
        lambda run: [path.unlink() for path in run.glob('*.pth')],
        None,
    ),
    'an empty folder': (lambda run: [path.unlink() for path in run.iterdir()], None),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_the_newest_complete_checkpoint(damage: str, run: Path) -> None:
    make, wanted = DAMAGES[damage]
    make(run)
    found = latest_checkpoint(str(run))
    assert found == (None if wanted is None else str(run / wanted))


@pytest.mark.parametrize('damage', ['half a pointer', 'half a checkpoint', 'no checkpoint at all'])
def test_a_run_resumes_by_a_mended_pointer(damage: str, run: Path) -> None:
    """mmengine's own way: ``resume=True`` and no file named."""
    make, wanted = DAMAGES[damage]
    make(run)
    (run / '.iter_3.pth.0123abcd.part').write_bytes(b'PK')
    seen: list[int] = []

    class First(tiny.Observer):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            seen.append(runner.iter)

    config = tiny.toy_config(run, train_cfg__max_iters=4, resume=True)
    tiny.train(config, First())
    assert seen[0] == (0 if wanted is None else int(wanted[5]))
    assert not list(run.glob('.*.part'))
    assert (run / 'last_checkpoint').read_text() == str(run / 'iter_4.pth')


# --- mmengine's checkpoint hook ------------------------------------------------------------------


def test_the_stock_name_is_ours_and_takes_the_stock_arguments() -> None:
    stock = dict(interval=3, max_keep_ckpts=2, save_best='auto', by_epoch=False)
    ours, theirs = HOOKS.build(dict(type='CheckpointHook', **stock)), CheckpointHook(**stock)
    assert type(ours) is SlopeCheckpointHook
    assert isinstance(ours, CheckpointHook)
    assert vars(ours) == vars(theirs)


class Diary(SlopeCheckpointHook):
    """What is in the folder each time that a checkpoint is about to be written."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self.diary = [*getattr(self, 'diary', []), set(Path(runner.work_dir).glob('*.pth'))]


def test_an_outdated_checkpoint_stays_until_the_next_is_complete(tmp_path: Path) -> None:
    config = tiny.toy_config(
        tmp_path, train_cfg__max_iters=4, default_hooks__checkpoint__interval=1
    )
    config.default_hooks.checkpoint = None
    diary = Diary(by_epoch=False, interval=1, max_keep_ckpts=1)
    tiny.train(config, diary)
    names = [{path.name for path in folder} for folder in diary.diary]
    assert names == [set(), {'iter_1.pth'}, {'iter_2.pth'}, {'iter_3.pth'}]
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_4.pth'}


def test_the_best_checkpoint_is_replaced_and_never_lost(tmp_path: Path) -> None:
    """Better results in a row, also twice at the same iteration (its file has the same name)."""
    config = tiny.toy_config(tmp_path)
    config.default_hooks.checkpoint = None
    diary = Diary(by_epoch=False, interval=1, save_best='acc', rule='greater', max_keep_ckpts=1)

    class Evaluate(tiny.Observer):
        def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            for score in (1, 2):
                diary.after_val_epoch(runner, {'acc': 10 * runner.iter + score})

    tiny.train(config, diary, Evaluate())
    assert all(any('best' in path.name for path in folder) for folder in diary.diary[2:])
    found = {path.name for path in tmp_path.glob('*.pth')}
    assert {name for name in found if 'best' in name} == {'best_acc_iter_1.pth'}
    assert load_checkpoint_file(tmp_path / 'best_acc_iter_1.pth')['state_dict']


def test_a_full_disk_ends_training_with_one_sentence(tmp_path: Path) -> None:
    config = tiny.toy_config(
        tmp_path, train_cfg__max_iters=3, default_hooks__checkpoint__interval=1
    )
    runner = Runner.from_cfg(config)

    class DiskEnds(tiny.Observer):
        def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            self.limit = longest_file((tmp_path / 'iter_1.pth').stat().st_size // 2)
            self.limit.__enter__()

    ends = DiskEnds()
    runner.register_hook(ends)
    try:
        with pytest.raises(StorageError, match=r'iter_2.pth.*File too large.*--resume'):
            runner.train()
    finally:
        ends.limit.__exit__(None, None, None)
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_1.pth')
    assert load_checkpoint_file(tmp_path / 'iter_1.pth')['meta']['iter'] == 1
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_1.pth'}
    assert not list(tmp_path.glob('.*'))


def test_a_pointer_that_cannot_be_written(two_epochs: Path, tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').mkdir()
    with pytest.raises(StorageError, match=r"last_checkpoint' cannot be written \(Is a directory"):
        tiny.train(tiny.toy_config(tmp_path))
    assert load_checkpoint_file(tmp_path / 'iter_2.pth')['meta']['iter'] == 2


@pytest.mark.parametrize('name', ['first.weight', 'mix.slope_step', 'norm.running_var'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_compressed_model_with_nan_is_not_saved(name: str, value: float, tmp_path: Path) -> None:
    """Without SlopeFiniteHook, too."""

    class Spoil(tiny.Observer):
        def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            if runner.iter == 1:
                runner.model.state_dict()[name].view(-1)[1] = value

    config = tiny.toy_config(
        tmp_path, train_cfg__max_iters=3, default_hooks__checkpoint__interval=1
    )
    spoil = Spoil()
    spoil.priority = 'VERY_HIGH'
    with pytest.raises(TensorError, match=rf'state_dict of iteration 2 .* {name}; it is not saved'):
        tiny.train(config, spoil)
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_1.pth'}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_1.pth')


def test_an_average_beside_a_model_with_nan_is_not_saved_either(tmp_path: Path) -> None:
    """EMAHook saves the average as the model, and the model under another key."""

    class Spoil(tiny.Observer):
        # After the average took its share.
        priority = 'LOW'

        def after_train_iter(self, runner: Any, batch_idx: int, **rest: Any) -> None:
            if runner.iter == 1:
                runner.model.first.weight.data.view(-1)[1] = float('nan')

    config = tiny.toy_config(
        tmp_path, train_cfg__max_iters=3, default_hooks__checkpoint__interval=1
    )
    config.custom_hooks = [dict(type='EMAHook')]
    with pytest.raises(TensorError, match=r'ema_state_dict of iteration 2 .* first\.weight'):
        tiny.train(config, Spoil())
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_1.pth'}
