"""tools/slopeify.py and tools/report.py: the child config, the plan, the report."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from mmengine.config import Config

import slope_mm
from slope_mm.engine.launch import build_model

ROOT = Path(__file__).parents[2]
STOCK = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run_tool(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *arguments])
        module = tool(name)
        module.launch.run_tool(module.main)

    return run_tool


def test_a_lazy_config_has_no_child(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (tiny.ROOT / 'tests/engine/lazy_retinanet.py').read_text()
    stock = text.replace('type=SlopeModel,\n    arch=RetinaNet', 'type=RetinaNet')
    stock = stock.replace("    recipe=dict(weight=dict(sparsity='2:4', bits=4)),\n", '')
    (tmp_path / 'stock.py').write_text(stock)
    arguments = (tmp_path / 'stock.py', '--recipe', 'naive_w4', '-o', tmp_path / 'mine.py')
    assert tiny.call_tool('slopeify', *arguments) != 0
    assert 'names classes' in capsys.readouterr().err
    assert not (tmp_path / 'mine.py').exists()


def test_the_child_config_is_the_stock_model_compressed(
    run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'new' / 'my_config.py'
    run('slopeify', STOCK, '--recipe', '2x8_w4', '-o', str(out))
    printed = capsys.readouterr().out
    assert 'rpn_head.rpn_cls' in printed and 'prediction layer' in printed
    assert 'backbone.conv1' in printed and 'stem' in printed
    config = Config.fromfile(str(out))
    assert len(out.read_text().splitlines()) < 25
    assert config.model.arch == 'MaskRCNN'
    assert config.model.backbone.frozen_stages == -1
    model = build_model(config)
    layers = slope_mm.compressed_layers(model)
    patterns = {str(layer.slope_spec) for layer in layers.values()}
    assert patterns == {'2:8 W4 A32', 'dense W8 A32'}
    assert len(layers) == 74


def test_without_a_recipe_it_is_the_one_that_came_closest(
    run: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / 'my_config.py'
    run('slopeify', STOCK, '-o', str(out))
    config = Config.fromfile(str(out))
    expected = Config.fromfile(str(tiny.ROOT / 'configs/_base_/recipes/naive_w4a4.py'))
    assert config.model.recipe == expected.recipe
    regularizer = config.optim_wrapper.get('regularizer', dict(type='none'))
    assert regularizer['type'] == expected.regularizer.type == 'none'


def test_hooks_and_constructors_of_the_stock_config_are_kept(
    run: Callable[..., None], tmp_path: Path
) -> None:
    stock = tmp_path / 'stock.py'
    stock.write_text(
        f'_base_ = [{STOCK!r}]\n'
        "custom_hooks = [dict(type='EMAHook', momentum=0.001)]\n"
        "optim_wrapper = dict(constructor='LearningRateDecayOptimizerConstructor',\n"
        '                     paramwise_cfg=dict(num_layers=6, decay_rate=0.9))\n'
    )
    out = tmp_path / 'child.py'
    run('slopeify', str(stock), '-o', str(out))
    config = Config.fromfile(str(out))
    assert config.custom_hooks[0] == {'type': 'EMAHook', 'momentum': 0.001}
    assert config.custom_hooks[-1]['type'] == 'slope_mm.SlopeMonitorHook'
    assert config.optim_wrapper.base_constructor == 'LearningRateDecayOptimizerConstructor'
    assert config.optim_wrapper.paramwise_cfg.num_layers == 6
    assert "_base_ = ['stock.py']" in out.read_text()


def test_the_detector_to_compress_is_named_by_the_config(
    run: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dense_run: tiny.Run,
    slope_run: tiny.Run,
) -> None:
    out = tmp_path / 'child.py'
    run('slopeify', str(dense_run.file), '-o', str(out))
    assert 'set load_from' in capsys.readouterr().out
    assert Config.fromfile(str(out)).load_from is None
    start = str(dense_run.checkpoint)
    run('slopeify', str(dense_run.file), '--load-from', start, '-o', str(out), '--force')
    assert 'set load_from' not in capsys.readouterr().out
    # The dense run keeps its folder.
    assert Config.fromfile(str(dense_run.file)).work_dir == dense_run.config.work_dir
    assert Config.fromfile(str(out)).work_dir == 'work_dirs/child'
    text = out.read_text()
    arguments = [str(dense_run.file), '-o', str(out), '--force', '--load-from']
    for wrong, word in ((slope_run.checkpoint, 'of a compressed'), ('none.pth', 'no checkpoint')):
        with pytest.raises(SystemExit):
            run('slopeify', *arguments, str(wrong))
        assert word in capsys.readouterr().err
        assert out.read_text() == text


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['nowhere.py'], ["there is no config 'nowhere.py'"]),
        ([STOCK, '--recipe', 'w5a5'], ["no recipe 'w5a5'", 'w4a4']),
        (['configs/mask_rcnn_r18_shapes_slope_w4.py', '-o', 'OUT'], ['has a SlopeModel already']),
        ([STOCK, '-o', __file__], ['is there already', '--force']),
        ([STOCK, '-o', 'a_folder/'], ["'a_folder' does not end in .py"]),
        ([__file__, '-o', __file__, '--force'], ['is the config that it would inherit from']),
        ([STOCK, '-o', f'{__file__}/x.py'], ['cannot be written', 'choose another place']),
        (['nopackage::a/b.py'], ["package 'nopackage', which is not installed"]),
    ],
)
def test_mistakes_end_in_one_line(
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(ROOT)
    before = Path(__file__).read_text()
    arguments = [str(tmp_path / 'out.py') if part == 'OUT' else part for part in arguments]
    with pytest.raises(SystemExit) as stop:
        run('slopeify', *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ')
    for word in words:
        assert word in error
    assert Path(__file__).read_text() == before
    assert not (tmp_path / 'out.py').exists()


def test_a_config_that_imports_classes_has_no_child_though_its_model_is_named(
    run: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dense_run: tiny.Run,
) -> None:
    """mmengine lets no config with strings inherit from it."""
    config = Config.fromfile(dense_run.file)
    config.custom_hooks = [dict(type='EMAHook')]
    stock = tiny.dump(config, tmp_path / 'stock.py')
    text = stock.read_text().replace("type='EMAHook'", 'type=EMAHook')
    stock.write_text(f'from mmengine.hooks import EMAHook\n\n{text}')
    out = tmp_path / 'child.py'
    out.write_text('# mine\n')
    with pytest.raises(SystemExit):
        run('slopeify', str(stock), '-o', str(out), '--force')
    assert 'names classes' in capsys.readouterr().err
    assert out.read_text() == '# mine\n'


def test_a_link_is_inherited_from_where_it_lies(
    run: Callable[..., None], tmp_path: Path, dense_run: tiny.Run
) -> None:
    (tmp_path / 'store').mkdir()
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/base.py').write_text(Path(dense_run.file).read_text())
    (tmp_path / 'store/child.py').write_text("_base_ = ['base.py']\n")
    (tmp_path / 'configs/child.py').symlink_to(tmp_path / 'store/child.py')
    run('slopeify', str(tmp_path / 'configs/child.py'), '-o', str(tmp_path / 'configs/mine.py'))
    assert Config.fromfile(tmp_path / 'configs/mine.py').model.type == 'slope_mm.SlopeModel'


def test_a_student_is_unfrozen_and_its_teacher_follows_by_names(
    run: Callable[..., None], tmp_path: Path
) -> None:
    stock = 'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
    run('slopeify', stock, '-o', str(tmp_path / 'mine.py'))
    config = Config.fromfile(tmp_path / 'mine.py')
    assert config.model.detector.backbone.frozen_stages == -1
    hooks = [hook['type'] for hook in config.custom_hooks]
    assert 'slope_mm.SlopeMeanTeacherHook' in hooks and 'MeanTeacherHook' not in hooks


def test_the_plan_needs_no_checkpoint_and_claims_no_cosine(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = ROOT / 'configs' / 'mask_rcnn_r18_shapes_slope_w2.py'
    run('report', str(config), '--csv', str(tmp_path / 'plan.csv'))
    printed = capsys.readouterr().out
    assert 'Plan of' in printed and 'Cosine' not in printed
    header, first = (tmp_path / 'plan.csv').read_text().splitlines()[:2]
    assert header.startswith('name,kind,shape,pattern,bits')
    assert first.startswith('backbone.conv1,Conv2d,16x3x7x7,dense,8')


def test_a_stock_config_has_no_plan(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run('report', str(ROOT / 'configs' / 'mask_rcnn_r18_shapes_scratch.py'))
    assert stop.value.code == 2
    assert 'slopeify' in capsys.readouterr().err
