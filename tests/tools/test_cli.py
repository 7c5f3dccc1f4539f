"""tools/train.py and tools/test.py: what they refuse and how, and what an evaluation gives."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.config import Config
from pycocotools import mask as mask_utils
from tool_calls import assert_refused, call, contents

from slope_mm import ConfigError
from slope_mm.engine import launch
from slope_mm.engine.tta import check_tta, use_tta

MakeConfig = Callable[..., Config]


# --- what is refused -----------------------------------------------------------------------------


def recipe(**changes: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.model.recipe.update(changes)

    return change


def weight(**changes: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.model.recipe.weight.update(changes)

    return change


def without_arch(config: Config) -> None:
    del config.model['arch']


def misspelled_arch(config: Config) -> None:
    config.model.arch = 'MaskRCN'


def without_data(config: Config) -> None:
    config.train_dataloader.dataset.data_root = 'nowhere/shapes/'


def without_validation_images(config: Config) -> None:
    config.val_dataloader.dataset.data_prefix.img = 'vall/'


def without_regularizer(config: Config) -> None:
    config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))


def misspelled_regularizer(config: Config) -> None:
    config.optim_wrapper.regularizer = dict(type='cosin')


def misspelled_limit(config: Config) -> None:
    config.optim_wrapper.step_limits = 0.01


# What is wrong, and what the error says: what, where, what to do.
MISTAKES: dict[str, tuple[Callable[[Config], None], list[str]]] = {
    'unknown key': (recipe(wieght={'bits': 4}), ["'wieght'", "nearest: 'weight'", 'allowed']),
    'unknown key of a part': (weight(bit=4), ["'bit'", "recipe's weight", "nearest: 'bits'"]),
    'idle rule': (
        recipe(rules=[dict(match='backbone.layr1', compress=False)]),
        ["match='backbone.layr1'", 'matches no layer', "nearest: 'backbone.layer1", 'correct or'],
    ),
    '4:2': (weight(sparsity='4:2'), ["'4:2'", "recipe's weight", "did you mean '2:4'?"]),
    '1 bit': (weight(bits=1), ['bits=1', 'weight', 'from 2 to 8']),
    '9 bits': (weight(bits=9), ['bits=9', 'weight', 'from 2 to 8']),
    '9 activation bits': (recipe(activation=dict(bits=9)), ['bits=9', 'activation', 'from 2 to 8']),
    'impossible pattern': (
        weight(sparsity='1:31'),
        ["no layer of this model can hold the recipe's sparsity '1:31'", 'choose another'],
    ),
    'no arch': (without_arch, ["no 'arch'", "arch='MaskRCNN'"]),
    'unknown arch': (misspelled_arch, ["arch='MaskRCN'", "nearest: 'MaskRCNN'"]),
    'no data': (
        without_data,
        ["train_dataloader: there is no 'nowhere/shapes", 'make it with: python tools/make_shapes'],
    ),
    'no validation images': (without_validation_images, ['val_dataloader: there is no', '/vall']),
    'no regularizer': (without_regularizer, ['no regularizer', 'SlopeOptimWrapperConstructor']),
    'unknown wrapper key': (misspelled_limit, ["'step_limits'", "did you mean 'step_limit'?"]),
    'unknown regularizer': (misspelled_regularizer, ["'cosin'", "nearest: 'cosine'"]),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_in_the_config(name: str, tiny_config: MakeConfig, tmp_path: Path) -> None:
    mistake, parts = MISTAKES[name]
    config = tiny_config(tmp_path / 'unused')
    mistake(config)
    file, work_dir = tiny.dump(config, tmp_path / 'config.py'), tmp_path / 'work'
    assert_refused(*call('train', file, '--work-dir', work_dir), parts)
    assert contents(work_dir) is None


@pytest.mark.parametrize(
    'option', ["model.recipe.rules=[dict(match='neck',compress=False)]", 'nothing', 'a=[1,(2]']
)
def test_options_that_cannot_be_read(option: str, slope_run: tiny.Run, tmp_path: Path) -> None:
    arguments = [slope_run.file, '--work-dir', tmp_path / 'work', '--cfg-options', 'a=1', option]
    parts = [
        f'--cfg-options {option!r} cannot be read',
        'KEY=VALUE',
        'write a config that inherits',
    ]
    assert_refused(*call('train', *arguments), parts)
    assert contents(tmp_path / 'work') is None


def test_a_lazy_base_that_is_missing(tmp_path: Path) -> None:
    base = 'with read_base():\n    from .nowhere import *\n'
    file = tmp_path / 'config.py'
    file.write_text(f'from mmengine.config import read_base\n\n{base}\nmodel = dict()\n')
    assert_refused(*call('train', file), [f"config '{file}' cannot be read", 'nowhere.py'])


def test_a_package_that_is_not_on_the_path(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.custom_imports = dict(imports=['package_that_is_nowhere'], allow_failed_imports=False)
    file = tiny.dump(config, tmp_path / 'config.py')
    parts = ["No module named 'package_that_is_nowhere'", 'install it', 'PYTHONPATH']
    assert_refused(*call('train', file, '--work-dir', tmp_path / 'work'), parts)


@pytest.mark.parametrize('existing', [False, True], ids=['new', 'existing'])
def test_nothing_is_written_or_overwritten(
    tiny_config: MakeConfig, tmp_path: Path, existing: bool
) -> None:
    file, work_dir = tiny.dump(tiny_config(tmp_path), tmp_path / 'config.py'), tmp_path / 'work'
    if existing:
        # What the Runner would write over.
        for name in ('config.py', 'epoch_1.pth', 'last_checkpoint', 'slope_layers.csv'):
            work_dir.mkdir(exist_ok=True)
            (work_dir / name).write_text('precious')
    before = contents(work_dir)
    options = ['--cfg-options', 'model.recipe.weight.sparsity=4:2']
    assert_refused(*call('train', file, '--work-dir', work_dir, *options), ['4:2'])
    assert contents(work_dir) == before


def test_the_checks_leave_the_config_as_it_is(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Stock detectors write into the config that they are built from; the Runner dumps it."""
    config = tiny_config(tmp_path / 'work')
    before = config.pretty_text
    launch.check_before_training(config)
    assert config.pretty_text == before


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_work_dir_that_cannot_be_written(
    tool: str, tiny_config: MakeConfig, slope_run: tiny.Run, tmp_path: Path
) -> None:
    (tmp_path / 'taken').write_text('a file')
    work_dir = tmp_path / 'taken' / 'work'
    arguments = [slope_run.checkpoint] if tool == 'test' else []
    parts = [f"work directory '{work_dir}' cannot be written", '--work-dir']
    assert_refused(
        *call(tool, slope_run.file, *arguments, '--work-dir', work_dir),
        parts,
    )
    assert (tmp_path / 'taken').read_text() == 'a file'


# --- checkpoints that do not fit -----------------------------------------------------------------


def other_architecture(config: Config) -> list[str]:
    config.model.neck.out_channels = config.model.rpn_head.in_channels = 32
    config.model.rpn_head.feat_channels = 32
    roi_head = config.model.roi_head
    for part in ('bbox_roi_extractor', 'mask_roi_extractor'):
        roi_head[part].out_channels = 32
    roi_head.bbox_head.in_channels = roi_head.mask_head.in_channels = 32
    config.model.backbone.base_channels = 16
    config.model.neck.in_channels = [16, 32, 64, 128]
    return ['belongs to another architecture than MaskRCNN', 'weights fit', 'instead of (16, 3,']


def other_recipe(config: Config) -> list[str]:
    config.model.recipe.weight.bits = 2
    return ["layer 'backbone.layer1.0.conv1' was compressed as '2:4 W4", "says '2:4 W2", 'use the']


@pytest.mark.parametrize('change', [other_architecture, other_recipe])
@pytest.mark.parametrize('how', ['load_from', 'resume', 'test'])
def test_checkpoints_of_something_else(
    how: str,
    change: Callable[[Config], list[str]],
    tiny_config: MakeConfig,
    slope_run: tiny.Run,
    tmp_path: Path,
) -> None:
    config, work_dir = tiny_config(tmp_path), tmp_path / 'work'
    parts = change(config)
    file = tiny.dump(config, tmp_path / 'config.py')
    arguments = {
        'load_from': ('train', file, '--cfg-options', f'load_from={slope_run.checkpoint}'),
        'resume': ('train', file, '--resume', slope_run.checkpoint),
        'test': ('test', file, slope_run.checkpoint),
    }[how]
    assert_refused(*call(*arguments, '--work-dir', work_dir), parts)
    assert contents(work_dir) is None


def test_a_dense_checkpoint_has_no_activation_steps_to_evaluate(
    slope_run: tiny.Run, dense_run: tiny.Run, tmp_path: Path
) -> None:
    parts = ["no activation step for layer 'backbone.conv1'", 'to 8 bits', 'train with this one']
    arguments = ('test', slope_run.file, dense_run.checkpoint, '--work-dir', tmp_path / 'work')
    assert_refused(*call(*arguments), parts)


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        (None, ["no checkpoint '", 'give the path']),
        ('text', ['neither a file of torch.save nor a packed']),
    ],
    ids=['missing', 'text'],
)
def test_what_is_no_checkpoint(
    slope_run: tiny.Run, tmp_path: Path, text: str | None, parts: list[str]
) -> None:
    checkpoint = tmp_path / 'epoch_9.pth'
    if text is not None:
        checkpoint.write_text(text)
    for arguments in (
        ('test', slope_run.file, checkpoint),
        ('train', slope_run.file, '--resume', checkpoint),
    ):
        assert_refused(*call(*arguments, '--work-dir', tmp_path / 'work'), [*parts, 'epoch_9.pth'])
    assert contents(tmp_path / 'work') is None


# --- other arguments -----------------------------------------------------------------------------


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(*call('train', tmp_path / 'no.py'), [f"no config '{tmp_path}/no.py'", 'give'])


def test_amp_without_a_gpu(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / 'work', validate=False)
    file = tiny.dump(config, tmp_path / 'config.py')
    assert call('train', file, '--amp', '--work-dir', tmp_path / 'work')[0] == 0
    rows = tiny.read_losses(tmp_path / 'work')
    assert len(rows) == 2
    assert all(np.isfinite(row['loss']) for row in rows)


def test_auto_scale_lr_without_a_base(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.pop('auto_scale_lr')
    file = tiny.dump(config, tmp_path / 'config.py')
    arguments = ('train', file, '--auto-scale-lr', '--work-dir', tmp_path / 'work')
    assert_refused(*call(*arguments), ['--auto-scale-lr needs', 'base_batch_size'])


def test_out_wants_a_pickle_file(slope_run: tiny.Run, tmp_path: Path) -> None:
    arguments = ('test', slope_run.file, slope_run.checkpoint, '--out', tmp_path / 'out.json')
    assert_refused(*call(*arguments), ['out.json', '.pkl'])


# --- as a user sees it ---------------------------------------------------------------------------


def in_a_shell(tool: str, *arguments: Any, folder: Path) -> tuple[int, str]:
    command = [sys.executable, tiny.ROOT / 'tools' / f'{tool}.py', *arguments]
    # The forks' mmdet warns about a package that it would like to have.
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore:faster'}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return done.returncode, done.stderr


def test_the_flagship_without_its_data_in_a_shell(tmp_path: Path) -> None:
    """mmengine warns on standard error about every ``mmdet::`` base; that is not shown."""
    config = tiny.ROOT / 'configs' / 'mask_rcnn_r50_slope_w4a4.py'
    parts = ["there is no 'data/coco/annotations/instances_train2017.json'", 'set train_dataloader']
    assert_refused(*in_a_shell('train', config, folder=tmp_path), parts)
    assert contents(tmp_path) == {}


def test_another_recipes_checkpoint_in_a_shell(slope_run: tiny.Run, tmp_path: Path) -> None:
    options = ['--cfg-options', 'model.recipe.weight.sparsity=1:4']
    arguments = ('test', slope_run.file, slope_run.checkpoint, '--work-dir', tmp_path / 'work')
    code, errors = in_a_shell(*arguments, *options, folder=tmp_path)
    assert_refused(code, errors, ["was compressed as '2:4 W4", "this recipe says '1:4"])
    assert contents(tmp_path) == {}


# --- evaluation ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def evaluated(slope_run: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory of tools/test.py with --out and --show-dir."""
    work_dir = tmp_path_factory.mktemp('evaluated')
    arguments = ('--work-dir', work_dir, '--out', work_dir / 'out.pkl', '--show-dir', 'shown')
    assert call('test', renamed(slope_run, work_dir), slope_run.checkpoint, *arguments)[0] == 0
    return work_dir


def renamed(run: tiny.Run, folder: Path) -> Path:
    """The run's config under names of its own."""
    return tiny.dump(tiny.name_run(Config.fromfile(run.file)), folder / 'config' / 'tiny.py')


def metrics(work_dir: Path) -> dict[str, float]:
    report = next(path for path in work_dir.glob('*/*.json'))
    return {k: v for k, v in json.loads(report.read_text()).items() if k.startswith('coco/')}


def predictions(file: Path) -> list[dict[str, Any]]:
    with file.open('rb') as stream:
        return [sample['pred_instances'] for sample in pickle.load(stream)]


def test_evaluation_gives_the_map_of_the_training_run(slope_run: tiny.Run, evaluated: Path) -> None:
    validation = tiny.read_scalars(slope_run.config.work_dir)[-1]
    wanted = {key: value for key, value in validation.items() if key.startswith('coco/')}
    assert metrics(evaluated) == wanted
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} < wanted.keys()


def test_out_holds_what_the_trained_model_predicts(slope_run: tiny.Run, evaluated: Path) -> None:
    """To the last bit, which the mAP of a tiny run may not show."""
    found = predictions(evaluated / 'out.pkl')
    model = slope_run.model.eval()
    with torch.no_grad():
        samples = model.val_step(tiny.first_batch(slope_run.config, 4, split='val'))
    assert sum(len(sample.pred_instances) for sample in samples) > 0
    for sample, instances in zip(samples, found, strict=True):
        wanted = sample.pred_instances
        assert torch.equal(instances['bboxes'], wanted.bboxes)
        assert torch.equal(instances['scores'], wanted.scores)
        masks = [mask_utils.decode(mask) for mask in instances['masks']]
        assert np.array_equal(np.array(masks, bool).reshape(wanted.masks.shape), wanted.masks)


def test_show_dir_holds_a_picture_per_image(evaluated: Path) -> None:
    pictures = [cv2.imread(str(path)) for path in evaluated.glob('*/shown/*')]
    assert len(pictures) == 4
    # The image and, beside it, the image with annotations.
    assert all(picture.shape == (64, 128, 3) for picture in pictures)


def test_options_reach_the_evaluation(slope_run: tiny.Run, tmp_path: Path) -> None:
    file, out = renamed(slope_run, tmp_path), tmp_path / 'out.pkl'
    options = ('--cfg-options', 'model.test_cfg.rcnn.score_thr=0.999')
    arguments = (file, slope_run.checkpoint, '--work-dir', tmp_path, '--out', out, *options)
    assert call('test', *arguments)[0] == 0
    assert [len(instances['scores']) for instances in predictions(out)] == [0] * 4


def test_tta_of_masks_is_not_to_be_had(slope_run: tiny.Run, tmp_path: Path) -> None:
    """mmdet's own stops at the first image with an assertion."""
    arguments = (slope_run.file, slope_run.checkpoint, '--work-dir', tmp_path / 'work', '--tta')
    assert_refused(*call('test', *arguments), ['--tta', 'merges boxes alone', 'leave the flag out'])
    assert contents(tmp_path / 'work') is None


@pytest.mark.parametrize('name', ['mask2former_r50_slope_w4', 'rtmdet_ins_s_slope_w4'])
def test_tta_of_masks_without_a_mask_head_is_refused(name: str) -> None:
    config = Config.fromfile(tiny.ROOT / 'configs' / f'{name}.py')
    assert 'mask_head' not in config.model
    with pytest.raises(ConfigError, match='merges boxes alone'):
        check_tta(config)


def test_tta_reaches_every_data_set(slope_run: tiny.Run) -> None:
    config = copy.deepcopy(slope_run.config)
    part = config.test_dataloader.dataset
    # As a lazy config names its transforms.
    part.pipeline = [dict(type=LoadAnnotations), *part.pipeline]
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[part, part.copy()])
    use_tta(config)
    for dataset in config.test_dataloader.dataset.datasets:
        assert dataset.pipeline[-1].type == 'TestTimeAug'
        assert not any('LoadAnnotations' in str(step.type) for step in dataset.pipeline)


def test_tta_of_boxes(slope_run: tiny.Run, evaluated: Path, tmp_path: Path) -> None:
    """The Faster R-CNN inside of the trained Mask R-CNN."""
    config = tiny.name_run(Config.fromfile(slope_run.file))
    config.model.arch = 'FasterRCNN'
    config.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    config.test_evaluator.metric = 'bbox'
    file, out = tiny.dump(config, tmp_path / 'boxes.py'), tmp_path / 'out.pkl'
    arguments = (file, slope_run.checkpoint, '--work-dir', tmp_path / 'work', '--out', out)
    assert call('test', *arguments, '--tta') == (0, '')
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'work')
    assert 'missing keys' not in tiny.read_log(tmp_path / 'work')
    plain, merged = predictions(evaluated / 'out.pkl'), predictions(out)
    same = [
        bool((torch.cdist(a['bboxes'], b['bboxes']) < 1e-3).any())
        for a, b in zip(plain, merged, strict=True)
    ]
    # The mirror image adds boxes and takes some away.
    assert any(same), 'boxes of the image itself survive the merging'
    assert any(len(a['bboxes']) != len(b['bboxes']) for a, b in zip(plain, merged, strict=True))
