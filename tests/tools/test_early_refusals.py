"""What tools look for before they begin: outputs, annotations, data, the config itself."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import tiny
from mmengine.config import Config
from tool_calls import assert_refused, call, contents

from slope_mm import DataError
from slope_mm.engine import launch
from slope_mm.engine.calibration_images import calibration_batches
from slope_mm.engine.data_files import check_data
from slope_mm.engine.dense_start import refuse_compressed
from slope_mm.errors import CheckpointError, ConfigError


def test_outputs_that_would_never_come_are_refused(slope_run: tiny.Run, tmp_path: Path) -> None:
    work = ('--work-dir', tmp_path / 'work')
    several = Config.fromfile(slope_run.file)
    metrics = [several.test_evaluator]
    several.test_evaluator = dict(
        type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['a']
    )
    file = tiny.dump(several, tmp_path / 'several.py')
    arguments = ('test', file, slope_run.checkpoint, *work, '--out', tmp_path / 'out.pkl')
    assert_refused(*call(*arguments), ['--out', 'one data set at a time'])
    blind = Config.fromfile(slope_run.file)
    blind.default_hooks.visualization = None
    file = tiny.dump(blind, tmp_path / 'blind.py')
    arguments = ('test', file, slope_run.checkpoint, *work, '--show-dir', 'shown')
    assert_refused(*call(*arguments), ['--show-dir', 'DetVisualizationHook'])
    nowhere = ('test', slope_run.file, slope_run.checkpoint, *work, '--out', '/proc/nope/out.pkl')
    assert_refused(*call(*nowhere), ["folder of --out '/proc/nope'", 'cannot be written'])
    assert contents(tmp_path / 'work') is None


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_annotations_of_the_metric_are_looked_for(
    tool: str, slope_run: tiny.Run, tmp_path: Path
) -> None:
    config = Config.fromfile(slope_run.file)
    for name in ('val_evaluator', 'test_evaluator'):
        config[name].ann_file = 'nowhere/val.json'
    file = tiny.dump(config, tmp_path / 'config.py')
    checkpoint = () if tool == 'train' else (slope_run.checkpoint,)
    code, errors = call(tool, file, *checkpoint, '--work-dir', tmp_path / 'work')
    assert_refused(code, errors, ["there is no 'nowhere/val.json'", 'evaluator.ann_file'])
    assert contents(tmp_path / 'work') is None


def test_data_of_a_storage_backend_are_left_to_it(slope_run: tiny.Run) -> None:
    loader = copy.deepcopy(slope_run.config.test_dataloader)
    loader.dataset.data_root = 'bucket/'
    with pytest.raises(DataError, match="there is no 'bucket/"):
        check_data(loader, 'test_dataloader')
    loader.dataset.backend_args = dict(backend='petrel')
    check_data(loader, 'test_dataloader')
    loader.dataset.backend_args = dict(backend='local')
    with pytest.raises(DataError, match="there is no 'bucket/"):
        check_data(loader, 'test_dataloader')


def test_no_tool_writes_over_what_it_reads(slope_run: tiny.Run, tmp_path: Path) -> None:
    config = Path(slope_run.file)
    before = config.read_bytes(), Path(slope_run.checkpoint).read_bytes()
    allocate = ('allocate', config, slope_run.checkpoint, '--size', '1MB', '--force', '-o')
    assert_refused(*call(*allocate, config), ['is the config that it would inherit from'])
    assert_refused(*call(*allocate, tmp_path / 'mine'), ['does not end in .py'])
    calibrate = ('calibrate', config, slope_run.checkpoint)
    assert_refused(*call(*calibrate, slope_run.checkpoint, '--force'), ['is the dense start'])
    below_a_file = (*calibrate, config / 'out.pth')
    assert_refused(*call(*below_a_file), ['cannot be written', 'is no folder to write to'])
    report = ('report', config, slope_run.checkpoint, '--csv')
    for own in (config, slope_run.checkpoint, Path(__file__)):
        assert_refused(*call(*report, own), ['would be written over', "ends in '.csv'"])
    assert (config.read_bytes(), Path(slope_run.checkpoint).read_bytes()) == before


def test_a_run_does_not_write_over_its_own_start(slope_run: tiny.Run, tmp_path: Path) -> None:
    start = tmp_path / 'work' / 'epoch_1.pth'
    start.parent.mkdir()
    shutil.copy(slope_run.checkpoint, start)
    before = contents(start.parent)
    option = ('--cfg-options', f'load_from={start}')
    for work in (start.parent, tmp_path / 'work/../work'):
        code, errors = call('train', slope_run.file, '--work-dir', work, *option)
        assert_refused(code, errors, ["run's own work directory", '--work-dir'])
    assert contents(start.parent) == before


def test_a_home_folder_in_a_checkpoints_path_is_found(
    slope_run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(slope_run.checkpoint, tmp_path / 'mine.pth')
    model = launch.build_model(slope_run.config)
    launch.check_checkpoint(model, '~/mine.pth', complete=True)
    with pytest.raises(CheckpointError, match='is of a compressed model already'):
        refuse_compressed('~/mine.pth')
    with pytest.raises(CheckpointError, match='there is no checkpoint'):
        launch.check_checkpoint(model, '~/yours.pth', complete=True)


def test_a_config_without_training_data_cannot_calibrate(slope_run: tiny.Run) -> None:
    config = copy.deepcopy(slope_run.config)
    config.train_dataloader = None
    with pytest.raises(ConfigError, match='has no train_dataloader'):
        calibration_batches(config, 1)


def test_configs_that_cannot_be_read_end_in_one_line(slope_run: tiny.Run, tmp_path: Path) -> None:
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    work = ('--work-dir', tmp_path / 'work')
    broken = call('train', tmp_path / 'broken.py', *work)
    assert_refused(*broken, ["broken.py' (or a base of it) cannot be read", 'line 1', 'mend it'])
    swapped = ('test', slope_run.checkpoint, slope_run.file, *work)
    assert_refused(*call(*swapped), ['is no config', 'the config comes first'])
    option = 'train_dataloader.dataset.pipeline.99.prob=0.5'
    arguments = ('train', slope_run.file, *work, '--cfg-options', option)
    assert_refused(*call(*arguments), ['an option does not fit into'])


def test_a_config_whose_scope_is_none_means_mmdets(slope_run: tiny.Run) -> None:
    """As mmdet's own lazy configs have it."""
    config = copy.deepcopy(slope_run.config)
    config.default_scope = None
    assert type(launch.build_model(config)).__name__ == 'MaskRCNN'
