"""tools/export.py: packed file and stock checkpoint, and the same mAP for all three."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import slope_mm
from slope_mm.engine.packed import stock_model
from slope_mm.packing import read_packed


def call(tool: str, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a tool that runs in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = tiny.call_tool(tool, *arguments)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope='module')
def exported(weight_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both files."""
    folder = tmp_path_factory.mktemp('exported')
    for kind, name in (('packed', 'model.slope'), ('stock', 'stock.pth')):
        code, out, errors = call(
            'export', kind, weight_run.file, weight_run.checkpoint, folder / name
        )
        assert code == 0, errors
        assert f'{(folder / name).stat().st_size:,} bytes' in out
        assert 'Not in it' not in out
    return folder


def metrics(config: Config, checkpoint: Path, work_dir: Path) -> dict[str, float]:
    """What tools/test.py finds, with predictions good enough for the mAP to tell them apart."""
    file = tiny.dump(tiny.name_run(config), work_dir / 'config' / 'tiny.py')
    code, _, errors = call(
        'test', file, checkpoint, '--work-dir', work_dir, '--out', work_dir / 'out.pkl'
    )
    assert code == 0, errors
    report = next(path for path in work_dir.glob('*/*.json'))
    return {k: v for k, v in json.loads(report.read_text()).items() if k.startswith('coco/')}


def read_predictions(file: Path) -> list[dict[str, Any]]:
    with file.open('rb') as stream:
        return [sample['pred_instances'] for sample in pickle.load(stream)]


def test_checkpoint_packed_file_and_stock_checkpoint_score_the_same(
    weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    stock = Config.fromfile(weight_run.file)
    stock.model = stock_model(stock.model.to_dict())
    found = {}
    for name, config, checkpoint in (
        ('checkpoint', Config.fromfile(weight_run.file), weight_run.checkpoint),
        ('packed', Config.fromfile(weight_run.file), exported / 'model.slope'),
        ('stock', Config.fromfile(weight_run.file), exported / 'stock.pth'),
        ('stock config', stock, exported / 'stock.pth'),
    ):
        found[name] = metrics(config, checkpoint, tmp_path / name)
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} < found['checkpoint'].keys()
    assert all(value == found['checkpoint'] for value in found.values())
    # To the last bit, which the mAP of a tiny run may not show.
    wanted, *others = [read_predictions(tmp_path / name / 'out.pkl') for name in found]
    assert sum(len(image['scores']) for image in wanted) > 0
    for images in others:
        for image, expected in zip(images, wanted, strict=True):
            assert all(torch.equal(image[key], expected[key]) for key in ('bboxes', 'scores'))
            assert image['masks'] == expected['masks']


def test_the_stock_checkpoint_loads_without_slope_mm(weight_run: tiny.Run, exported: Path) -> None:
    """Into the stock model with strict=True, by torch's own strict reader, in another process."""
    program = f"""
import sys
sys.modules['slope_mm'] = None
import torch
from mmengine.config import Config
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
register_all_modules()
config = Config.fromfile({str(weight_run.file)!r})
model = dict(config.model, type=config.model.arch)
del model['arch'], model['recipe']
stock = MODELS.build(model)
checkpoint = torch.load({str(exported / 'stock.pth')!r}, weights_only=True)
stock.load_state_dict(checkpoint['state_dict'], strict=True)
print(checkpoint['meta']['dataset_meta']['classes'][0])
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The maintained fork of mmdet prints lines of its own when it is imported.
    assert done.stdout.splitlines()[-1] == 'circle'
    wanted = slope_mm.bake(weight_run.model).state_dict()
    state = torch.load(exported / 'stock.pth', weights_only=True)['state_dict']
    assert tiny.differing(state, wanted) == []


def test_a_packed_file_serves_as_a_checkpoint_of_export(
    weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    again, stock = tmp_path / 'again.slope', tmp_path / 'stock.pth'
    source = exported / 'model.slope'
    assert call('export', 'packed', weight_run.file, source, again)[0] == 0
    assert call('export', 'stock', weight_run.file, source, stock)[0] == 0
    states = [
        torch.load(p, weights_only=True)['state_dict'] for p in (stock, exported / 'stock.pth')
    ]
    assert tiny.differing(*states) == []
    assert {k: v.tobytes() for k, v in read_packed(again).items()} == {
        k: v.tobytes() for k, v in read_packed(source).items()
    }


def test_weights_that_are_compressed_already_are_no_latent_ones(
    weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'again.slope'
    code, _, errors = call('export', 'packed', weight_run.file, exported / 'stock.pth', out)
    assert code == 2 and not out.exists()
    assert 'compressed weights of the stock model' in errors and len(errors.splitlines()) == 1


def test_a_dense_checkpoint_is_known_as_such(
    weight_run: tiny.Run, dense_run: tiny.Run, tmp_path: Path
) -> None:
    out = tmp_path / 'one_shot.slope'
    with pytest.warns(UserWarning, match='is the checkpoint of a dense model'):
        code, *_ = call('export', 'packed', weight_run.file, dense_run.checkpoint, out)
    assert code == 0 and out.exists()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*dense model')
        code, *_ = call('export', 'packed', weight_run.file, weight_run.checkpoint, out)
    assert code == 0


def test_options_of_the_packed_file(weight_run: tiny.Run, exported: Path, tmp_path: Path) -> None:
    for options in (['--coding', 'bitmask'], ['--dtype', 'float16'], ['--fold-bn']):
        out = tmp_path / f'{options[-1]}.slope'
        code, _, errors = call(
            'export', 'packed', weight_run.file, weight_run.checkpoint, out, *options
        )
        assert code == 0, errors
    smallest = (exported / 'model.slope').stat().st_size
    assert (tmp_path / 'bitmask.slope').stat().st_size > smallest
    assert (tmp_path / 'float16.slope').stat().st_size < smallest
    assert (tmp_path / '--fold-bn.slope').stat().st_size < smallest


def test_what_a_stock_model_loses_is_said_and_measured(slope_run: tiny.Run, tmp_path: Path) -> None:
    out = tmp_path / 'stock.pth'
    code, printed, errors = call(
        'export', 'stock', slope_run.file, slope_run.checkpoint, out, '--fold-bn', '--evaluate'
    )
    assert code == 0, errors
    assert 'Not in it: the input quantizers (' in printed and 'layers to 4 bits' in printed
    table = [line.split() for line in printed.splitlines() if line.startswith('coco/')]
    assert {row[0] for row in table} >= {'coco/bbox_mAP', 'coco/segm_mAP'}
    assert all(len(row) == 3 for row in table)
    config = Config(dict(model=stock_model(slope_run.config.model.to_dict())))
    stock = MODELS.build(config.model)
    stock.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)


@pytest.mark.parametrize('kind', ['packed', 'stock'])
def test_mistakes_end_in_one_line(kind: str, weight_run: tiny.Run, tmp_path: Path) -> None:
    for arguments, part in (
        ((weight_run.file, tmp_path / 'no.pth', tmp_path / 'out'), 'there is no checkpoint'),
        ((weight_run.file, weight_run.checkpoint, tmp_path), 'is a directory'),
        ((tmp_path / 'no.py', weight_run.checkpoint, tmp_path / 'out'), 'there is no config'),
    ):
        code, _, errors = call('export', kind, *arguments)
        assert code == 2 and errors.startswith('error: ') and errors.count('\n') == 1
        assert part in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kind', ['packed', 'stock'])
def test_what_is_no_export_of_the_kind_is_never_written_over(
    kind: str, weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    mine, own = tmp_path / 'mine.pth', tmp_path / 'own'
    shutil.copy(weight_run.checkpoint, mine)
    # An earlier export is.
    earlier = exported / ('model.slope' if kind == 'packed' else 'stock.pth')
    shutil.copy(earlier, own)
    code, _, errors = call('export', kind, weight_run.file, mine, own)
    assert code == 0, errors
    other = exported / ('stock.pth' if kind == 'packed' else 'model.slope')
    shutil.copy(other, own)
    for checkpoint, out, words in (
        (mine, mine, 'is the checkpoint itself'),
        (exported / 'model.slope', mine, 'exists and is not'),
        (mine, own, 'exists and is not'),
    ):
        before = out.read_bytes()
        code, _, errors = call('export', kind, weight_run.file, checkpoint, out)
        assert code == 2 and words in errors and errors.count('\n') == 1
        assert out.read_bytes() == before


def test_a_packed_file_cannot_be_resumed_but_started_from(
    weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    file, packed = weight_run.file, exported / 'model.slope'
    code, _, errors = call('train', file, '--resume', packed, '--work-dir', tmp_path / 'work')
    assert code == 2 and errors.count('\n') == 1 and 'no optimizer to resume with' in errors
    assert not (tmp_path / 'work').exists()
    config = tiny.name_run(Config.fromfile(file))
    config.work_dir, config.load_from = str(tmp_path / 'tuned'), str(packed)
    tuned = tiny.train(config)
    assert tiny.masks_of(tuned.model).keys() == tiny.masks_of(weight_run.model).keys()
    # Masks move again: the schedule hook releases what the file held.
    assert all(
        layer.slope_mask is None for layer in slope_mm.compressed_layers(tuned.model).values()
    )


def test_a_damaged_packed_file_ends_in_one_line(
    weight_run: tiny.Run, exported: Path, tmp_path: Path
) -> None:
    damaged = bytearray((exported / 'model.slope').read_bytes())
    damaged[-100] ^= 8
    (tmp_path / 'damaged.slope').write_bytes(damaged)
    arguments = (weight_run.file, tmp_path / 'damaged.slope', '--work-dir', tmp_path / 'work')
    code, _, errors = call('test', *arguments)
    assert code == 2 and errors.count('\n') == 1 and 'damaged.slope is damaged' in errors
    assert not (tmp_path / 'work').exists()
