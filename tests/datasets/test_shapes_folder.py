"""The shapes folder: what is there already, bad options and the tool: in nobody's way."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_shapes import SMALL, contents

from slope_mm.datasets import shapes
from slope_mm.datasets.shapes import ShapesOptions, ShapesPaths, ensure_shapes, make_shapes
from slope_mm.errors import DataError

TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'


# ---- what is there already -----------------------------------------------------------------------


def test_ensure_makes_once_and_then_leaves_alone(tmp_path: Path) -> None:
    options = {**SMALL, 'num_train': 2, 'num_val': 1}
    paths = ensure_shapes(tmp_path / 'deep' / 'set', **options)
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob('*')}
    # The same set in other words: a list for a pair.
    again = ensure_shapes(str(paths.root), **{**options, 'image_size': [72, 96]})
    assert again == paths
    assert {path: path.stat().st_mtime_ns for path in paths.root.rglob('*')} == before
    assert sorted(path.name for path in paths.root.parent.iterdir()) == ['set']


@pytest.mark.parametrize('make', [make_shapes, ensure_shapes])
def test_a_different_set_is_refused_with_a_remedy(
    small: ShapesPaths, make: Callable[..., ShapesPaths]
) -> None:
    before = contents(small.root)
    with pytest.raises(DataError) as caught:
        make(small.root, **{**SMALL, 'num_train': 25})
    message = str(caught.value)
    assert 'has num_train=24, asked for 25' in message
    assert 'num_val=' not in message
    assert str(small.root) in message
    assert '--force' in message
    assert '--train 25' in message
    assert contents(small.root) == before


def test_make_refuses_even_the_same_set(small: ShapesPaths) -> None:
    with pytest.raises(DataError, match='is the same shapes data set'):
        make_shapes(small.root, **SMALL)


@pytest.mark.parametrize('force', [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / 'thesis.txt').write_text('years of work')
    (tmp_path / 'meta.json').write_text('{"generator": "another program"}')
    before = contents(tmp_path)
    with pytest.raises(DataError, match='is not a shapes data set'):
        make_shapes(tmp_path, force=force, **SMALL)
    assert contents(tmp_path) == before


def test_a_set_beside_files_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=2, num_val=1)
    (paths.root / 'annotations' / 'mine.json').write_text('{}')
    before = contents(paths.root)
    with pytest.raises(DataError, match=r"not the data set's: annotations/mine\.json\."):
        make_shapes(paths.root, force=True, num_train=3, num_val=1)
    assert contents(paths.root) == before


@pytest.mark.parametrize('lost', ['train/000001.png', 'annotations/val.json'])
@pytest.mark.parametrize('emptied', [True, False])
def test_a_set_that_has_lost_a_file_is_not_taken_for_whole(
    tmp_path: Path, lost: str, emptied: bool
) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=2, num_val=1)
    (paths.root / lost).write_bytes(b'') if emptied else (paths.root / lost).unlink()
    with pytest.raises(DataError, match=f'has lost {lost}'):
        ensure_shapes(paths.root, num_train=2, num_val=1)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    paths = make_shapes(tmp_path / 'empty', num_train=1, num_val=1)
    assert paths.meta.is_file()


def test_a_set_that_lost_a_part_is_not_taken_for_whole(tmp_path: Path) -> None:
    options = {**SMALL, 'num_train': 1, 'num_val': 1}
    paths = ensure_shapes(tmp_path / 'set', **options)
    paths.val_annotations.unlink()
    with pytest.raises(DataError, match=r'has lost annotations/val\.json'):
        ensure_shapes(paths.root, **options)


def test_an_older_generator_is_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ensure_shapes(tmp_path / 'set', num_train=1, num_val=1)
    monkeypatch.setattr(shapes, '_VERSION', shapes._VERSION + 1)
    with pytest.raises(DataError, match='was made by generator version'):
        ensure_shapes(paths.root, num_train=1, num_val=1)


def fail_at(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException) -> None:
    draw = shapes.draw_scene

    def interrupted(options: ShapesOptions, split: str, index: int) -> Any:
        if index == image:
            raise error
        return draw(options, split, index)

    monkeypatch.setattr(shapes, 'draw_scene', interrupted)


def test_an_interrupted_make_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / 'set', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_data_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, OSError(28, 'No space left on device'))
    with pytest.raises(DataError, match='No space left on device'):
        make_shapes(tmp_path / 'set', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=1, num_val=1)
    before = contents(paths.root)
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_shapes(paths.root, force=True, **SMALL)
    assert contents(paths.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_an_interruption_between_the_two_renames_keeps_the_old_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_shapes(tmp_path / 'set', num_train=1, num_val=1)
    before = contents(paths.root)
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == 'new':
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(paths.root, force=True, **SMALL)
    assert contents(paths.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_set_finished_by_another_process_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shapes._write_set
    root = tmp_path / 'set'

    def overtaken(paths: ShapesPaths, options: ShapesOptions) -> None:
        write(paths, options)
        write(ShapesPaths(root), options)

    monkeypatch.setattr(shapes, '_write_set', overtaken)
    ensure_shapes(root, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_place_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    # A folder below a file cannot be made by anyone, not even by root.
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match='cannot make the data set') as caught:
        ensure_shapes(tmp_path / 'file' / 'set', **SMALL)
    assert str(tmp_path / 'file' / 'set') in str(caught.value)


def test_a_file_in_the_way_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(DataError, match='is not a shapes data set'):
        make_shapes(tmp_path / 'file', force=True, **SMALL)
    assert (tmp_path / 'file').read_text() == 'mine'


# ---- bad options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_train': 0}, 'num_train must be 1 to 1000000, got 0'),
        ({'num_val': -1}, 'num_val'),
        ({'num_train': 2.5}, 'num_train must be an integer'),
        ({'num_train': True}, 'num_train must be an integer'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'image_size': -128}, 'image_size'),
        ({'image_size': (128, 0)}, 'image_size'),
        ({'image_size': (128, 128, 3)}, 'image_size must be a pair'),
        ({'image_size': '128'}, 'image_size must be a pair'),
        ({'image_size': 64}, 'objects of up to 72 px do not fit into images of 64x64'),
        ({'object_size': (10, 30)}, 'object_size'),
        ({'object_size': (50, 30)}, r'\(smallest, largest\)'),
        ({'object_size': (20, 200)}, 'do not fit'),
        ({'min_objects': 0}, 'min_objects'),
        ({'min_objects': 4, 'max_objects': 3}, 'max_objects must be at least 4'),
        ({'num_classes': 3}, 'num_classes must be 4 to 6, got 3'),
        ({'num_classes': 7}, 'num_classes'),
        ({'num_clases': 5}, 'unknown option num_clases; known are seed, num_train'),
    ],
)
@pytest.mark.parametrize('make', [make_shapes, ensure_shapes])
def test_bad_options(
    make: Callable[..., ShapesPaths], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path / 'set', **options)
    assert list(tmp_path.iterdir()) == []


def test_more_figures_than_an_image_can_hold(tmp_path: Path) -> None:
    crowded = {'min_objects': 40, 'max_objects': 40, 'object_size': (60, 72)}
    with pytest.raises(DataError, match=r'image train/0 has room for \d+ recognisable figures'):
        make_shapes(tmp_path / 'set', **crowded)
    assert list(tmp_path.iterdir()) == []


# ---- the tool ------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name='__main__')
        return int(caught.value.code or 0)

    return run


def test_the_tool_makes_keeps_refuses_and_remakes(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'set'
    options = ['--size', '64', '--object-size', '16', '40', '--train', '2', '--val', '1']
    assert tool(str(root), *options) == 0
    first = contents(root)
    assert tool(str(root), *options) == 0
    assert contents(root) == first
    capsys.readouterr()

    assert tool(str(root), *options, '--seed', '1') == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.count('\n') == 1
    assert printed.err.startswith('make_shapes: ')
    assert contents(root) == first

    # The command in the message is one that works.
    command = printed.err.split('`')[1].split()
    assert command[:2] == ['python', 'tools/make_shapes.py']
    assert tool(*command[2:]) == 0
    assert contents(root) != first
    assert ensure_shapes(root, seed=1, image_size=64, object_size=(16, 40), num_train=2, num_val=1)
