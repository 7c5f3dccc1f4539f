"""tools/export.py onnx and check, and tools/test.py on what they write."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import pytest
import tiny
import torch
from mmengine.config import Config

from slope_mm.engine import launch

DEMO = tiny.ROOT / 'work_dirs' / 'demo' / 'slope'
DEMO_CONFIG = tiny.ROOT / 'configs' / 'mask_rcnn_r18_shapes_slope_w4a4.py'


def call(tool: str, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a tool that runs in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = tiny.call_tool(tool, *arguments)
    return code, out.getvalue(), errors.getvalue()


def evaluate(
    config: Config, checkpoint: Path, work_dir: Path, *options: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and predictions of tools/test.py."""
    file = tiny.dump(tiny.name_run(config), work_dir / 'config' / 'tiny.py')
    out = work_dir / 'out.pkl'
    code, _, errors = call('test', file, checkpoint, '--work-dir', work_dir, '--out', out, *options)
    assert code == 0, errors
    report = json.loads(next(work_dir.glob('*/*.json')).read_text())
    with out.open('rb') as stream:
        found = [sample['pred_instances'] for sample in pickle.load(stream)]
    return {key: value for key, value in report.items() if key.startswith('coco/')}, found


@pytest.mark.parametrize('name', ['weight_run', 'slope_run'])
def test_the_export_scores_what_the_checkpoint_scores(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: tiny.Run = request.getfixturevalue(name)
    out = tmp_path / 'out'
    code, printed, errors = call(
        'export', 'onnx', run.file, run.checkpoint, out, '--evaluate', '--num-images', 1
    )
    assert code == 0, errors
    for part in ('dense', 'roi_head.bbox_head', 'roi_head.mask_head'):
        size = (out / f'{part}.onnx').stat().st_size
        assert f'{part}.onnx: {size:,} bytes' in printed
    assert ('MatMulIntegerToFloat' in printed) == (name == 'slope_run')
    told = json.loads((out / 'detector.json').read_text())['facts']['metrics']
    config = Config.fromfile(run.file)
    before, expected = evaluate(config, run.checkpoint, tmp_path / 'torch')
    # Which copies the model.
    config.custom_hooks.append(dict(type='EMAHook'))
    after, found = evaluate(config, out, tmp_path / 'onnx', '--backend', 'onnxruntime')
    assert told['checkpoint'] == pytest.approx(before)
    assert told['onnx'] == pytest.approx(after)
    for key, value in before.items():
        assert after[key] == pytest.approx(value, abs=1e-3), key
    # The mAP of a tiny run may not show much; its boxes do.
    assert sum(len(image['scores']) for image in expected) > 0
    for image, wanted in zip(found, expected, strict=True):
        assert torch.allclose(image['scores'], wanted['scores'], atol=1e-4)
        assert torch.allclose(image['bboxes'], wanted['bboxes'], atol=1e-2)


def test_own_images_serve_where_there_is_no_data_set(slope_run: tiny.Run, tmp_path: Path) -> None:
    picture = tmp_path / 'picture.png'
    dataset = slope_run.config.test_dataloader.dataset
    images = sorted(Path(dataset.data_root, dataset.data_prefix.img).iterdir())
    cv2.imwrite(str(picture), cv2.imread(str(images[0])))
    moved = ['--cfg-options', f'test_dataloader.dataset.data_root={tmp_path}/nowhere/']
    arguments = ('onnx', slope_run.file, slope_run.checkpoint, tmp_path / 'out')
    code, _, errors = call('export', *arguments, *moved)
    assert code == 2 and errors.count('\n') == 1 and 'with --images' in errors
    code, _, errors = call('export', *arguments, '--images', tmp_path / 'no.png', *moved)
    assert code == 2 and "there is no image '" in errors
    assert not (tmp_path / 'out').exists()
    code, _, errors = call('export', *arguments, '--images', picture, *moved)
    assert code == 0, errors
    assert (tmp_path / 'out' / 'detector.json').is_file()


def test_int4_halves_the_portable_graph(slope_run: tiny.Run, tmp_path: Path) -> None:
    arguments = ('onnx', slope_run.file, slope_run.checkpoint)
    assert call('export', *arguments, tmp_path / 'int8')[0] == 0
    code, _, errors = call('export', *arguments, tmp_path / 'int4', '--int4')
    assert code == 0, errors
    sizes = [(tmp_path / f / 'roi_head.bbox_head.onnx').stat().st_size for f in ('int8', 'int4')]
    assert sizes[1] < 0.7 * sizes[0]


def test_mistakes_end_in_one_line(slope_run: tiny.Run, tmp_path: Path) -> None:
    work = ('--work-dir', tmp_path / 'work')
    export = ('export', 'onnx', slope_run.file, slope_run.checkpoint, tmp_path / 'out')
    for arguments, part in (
        ((*export, '--num-images', '0'), '--num-images 0 is no number of images >= 1'),
        (('test', slope_run.file, tmp_path, '--backend', 'onnxruntime', *work), 'there is no'),
        (
            ('test', slope_run.file, slope_run.checkpoint, '--backend', 'semi_structured', *work),
            'need a CUDA GPU',
        ),
        (('export', 'onnx', slope_run.file, tmp_path / 'no.pth', tmp_path / 'o'), 'no checkpoint'),
    ):
        code, _, errors = call(*arguments)
        assert code == 2 and errors.startswith('error: ') and errors.count('\n') == 1
        assert part in errors
    assert list(tmp_path.iterdir()) == []


def test_check_prints_a_line_a_layer(slope_run: tiny.Run) -> None:
    code, printed, errors = call('export', 'check', slope_run.file, slope_run.checkpoint)
    assert code == 0, errors
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert 'no: 3 input channels are no multiple of 4' in lines['backbone.conv1']
    assert 'too small to pay' in lines['neck.fpn_convs.0.conv']
    assert 'transposed convolution' in lines['roi_head.mask_head.upsample']


def weight_only(config: Config, checkpoint: Path, out: Path) -> Config:
    """Writes a checkpoint of the same weights without input quantizers; returns its config."""
    config = Config(config.to_dict())
    config.model.recipe.activation = None
    trained = torch.load(checkpoint, weights_only=False)['state_dict']
    weights = {key: value for key, value in trained.items() if '.slope_' not in key}
    torch.save({'state_dict': weights, 'meta': {}}, out)
    model = launch.build_model(config)
    launch.load_weights(model, str(out))
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, out)
    return config


@pytest.mark.skipif(
    not any(DEMO.glob('epoch_*.pth')), reason='needs the model that `make demo` trains'
)
def test_all_files_of_the_demos_model_score_the_same(tmp_path: Path) -> None:
    """As trained: checkpoint, packed file, ONNX. Without input quantizers, which a plain
    checkpoint does not have: the plain one as well."""
    trained = max(DEMO.glob('epoch_*.pth'), key=lambda path: int(path.stem.split('_')[1]))
    config, bare = Config.fromfile(DEMO_CONFIG), tmp_path / 'weight_only.pth'
    cases = [
        (config, trained, ('packed', 'onnx')),
        (weight_only(config, trained, bare), bare, ('packed', 'stock', 'onnx')),
    ]
    for number, (config, checkpoint, kinds) in enumerate(cases):
        folder = tmp_path / str(number)
        file = tiny.dump(config, folder / 'config.py')
        before, _ = evaluate(config, checkpoint, folder / 'checkpoint')
        assert before['coco/bbox_mAP'] > 0.3
        for kind in kinds:
            out = folder / f'model.{kind}'
            code, _, errors = call('export', kind, file, checkpoint, out)
            assert code == 0, errors
            options = ('--backend', 'onnxruntime') if kind == 'onnx' else ()
            after, _ = evaluate(config, out, folder / kind, *options)
            if kind != 'onnx':
                assert after == before, kind
            for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
                assert after[key] == pytest.approx(before[key], abs=1.0001e-3), kind
