"""What happens to the file that is written, and to the one that stood there."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from convertible_net import W4, W4A4, trained

from slope_mm import PackedFileError
from slope_mm.packing import read_packed, save_packed

NAN, INF = float('nan'), float('inf')


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = trained(W4)
    for name in ('a', 'b'):
        save_packed(model, tmp_path / name, meta=dict(b=1, a=2))
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / 'model.slope'
    path.write_text('older')
    save_packed(trained(W4), path)
    assert contents(tmp_path).keys() == {'model.slope'}
    assert read_packed(path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize('existing', [False, True])
def test_a_full_disk_changes_nothing(existing: bool, tmp_path: Path) -> None:
    """The kernel's limit on a file's length stands in for the disk's end."""
    model, path = trained(W4), tmp_path / 'model.slope'
    if existing:
        path.write_text('older')
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            PackedFileError, match='cannot be written .* nothing was changed'
        ) as info:
            save_packed(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(info.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ('where', 'value'),
    [
        ('weight', NAN),
        ('weight', INF),
        *((step, value) for step in ('slope_step', 'slope_act_step') for value in (NAN, INF, 1e37)),
    ],
)
def test_what_no_reader_would_take_replaces_nothing(
    where: str, value: float, tmp_path: Path
) -> None:
    model, path = trained(W4A4), tmp_path / 'model.slope'
    save_packed(model, path)
    before = contents(tmp_path)
    # A mask that is found anew would refuse the weight first.
    model.conv.hold_mask()
    with torch.no_grad():
        getattr(model.conv, where).view(-1)[0] = value
    with pytest.raises(PackedFileError, match="layer 'conv'.*checkpoint that is finite"):
        save_packed(model, path)
    assert contents(tmp_path) == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = trained(W4)
    with pytest.raises(PackedFileError, match='is a directory'):
        save_packed(model, tmp_path)
    with pytest.raises(PackedFileError, match='cannot be written'):
        save_packed(model, tmp_path / 'missing' / 'model.slope')
    assert list(tmp_path.iterdir()) == []
