"""What the tests that run mmengine share: configs shrunk to seconds, a toy model, and readers."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from yapf.yapflib import yapf_api

import slope_mm
from slope_mm.datasets.shapes import ShapesPaths

ROOT = Path(__file__).parents[1]
# Major and minor version.
TORCH = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
needs_kernels = pytest.mark.skipif(
    TORCH < (2, 6), reason='needs torch 2.6, which loads kernels compiled ahead of time'
)
# conftest.py hides GPUs unless asked not to; some torch still call CUDA available then.
HAS_CUDA = torch.cuda.device_count() > 0
NEEDS_CUDA = 'needs a CUDA GPU, and SLOPE_TESTS_ON=cuda in the environment'
IMAGE_SIZE = 64
SLOPE = 'mask_rcnn_r18_shapes_slope_w4a4'
TOY_RECIPE = dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4))

_numbers = itertools.count()

# A run prints its config six times, and laying it out takes as long as the training: once will do.
_layouts: dict[str, Any] = {}


def _lay_out_once(lay_out: Any) -> Any:
    def laid_out(text: str, **style: Any) -> Any:
        if text not in _layouts:
            _layouts[text] = lay_out(text, **style)
        return _layouts[text]

    return laid_out


yapf_api.FormatCode = _lay_out_once(yapf_api.FormatCode)
# The maintained fork asks yapf itself when it prints.
if hasattr(config_module, 'FormatCode'):
    config_module.FormatCode = yapf_api.FormatCode


def tiny_config(
    shapes: ShapesPaths,
    work_dir: Path | str,
    name: str = SLOPE,
    epochs: int = 1,
    validate: bool = True,
    **options: Any,
) -> Config:
    """Shrinks ``configs/NAME.py``: two iterations an epoch, four images of 64 px each.

    Args:
        shapes: The data set.
        work_dir: The run's work directory.
        name: Config name without ending.
        epochs: Length of training.
        validate: Whether a validation comes at its end.
        **options: What else is different, by key; ``__`` stands for the dots of nested keys.
    """
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    config.load_from = None
    config.work_dir = str(work_dir)
    config.merge_from_dict({'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': epochs})
    config.train_dataloader.batch_size = 4
    _use_data(config, shapes)
    _shrink_model(config.model)
    if not validate:
        config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)
    ]
    config.default_hooks.logger.interval = 1
    config.log_processor.window_size = 1
    for hook in config.custom_hooks:
        if hook.type == 'slope_mm.SlopeCalibrationHook':
            hook.batches = 1
        if hook.type == 'slope_mm.SlopeMonitorHook':
            hook.update(interval=1, picture=False)
    config.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return name_run(config)


def name_run(config: Config) -> Config:
    """Gives a run names of its own: mmengine keeps loggers and visualizers by name."""
    number = next(_numbers)
    config.experiment_name = f'run_{number}'
    if config.get('visualizer'):
        config.visualizer.name = f'visualizer_{number}'
    return config


def _use_data(config: Config, shapes: ShapesPaths) -> None:
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = config[loader].dataset
        dataset.data_root = f'{shapes.root}/'
        for step in dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (IMAGE_SIZE, IMAGE_SIZE)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        config[evaluator].ann_file = str(shapes.val_annotations)


def _shrink_model(model: Any) -> None:
    model.backbone.base_channels = 8
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32)
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)


# --- running -------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training that is over: its config, also as a file, what it trained and what it saved."""

    config: Config
    file: Path
    runner: Runner
    checkpoint: Path

    @property
    def model(self) -> nn.Module:
        return self.runner.model


class Observer(Hook):
    """A hook that sees what all others have done."""

    priority = 'LOWEST'


def train(config: Config, *hooks: Hook) -> Run:
    """Trains as ``tools/train.py`` does, and writes the config into the work directory."""
    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    file = dump(config, Path(config.work_dir) / 'tiny.py')
    # A run without checkpoints has none.
    last = Path(config.work_dir) / 'last_checkpoint'
    return Run(config, file, runner, Path(last.read_text()) if last.exists() else Path())


def dump(config: Config, path: Path) -> Path:
    """Writes a config as a file that tools take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config.dump(path)
    return path


def build(config: Config) -> nn.Module:
    """Builds a config's model, weights initialised."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def first_batch(config: Config, size: int = 2, split: str = 'train') -> Any:
    """A batch of a split, collated, always the same images."""
    init_default_scope('mmdet')
    loader = config[f'{split}_dataloader'].copy()
    loader.update(batch_size=size, sampler=dict(type='DefaultSampler', shuffle=False))
    torch.manual_seed(0)
    return next(iter(Runner.build_dataloader(loader, seed=0)))


def load_tool(name: str) -> Any:
    """Imports ``tools/NAME.py``, to call its ``main``."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_tool(name: str, *arguments: Any) -> int:
    """Runs a tool in this process as its ``__main__`` block would; returns the exit code."""
    tool = load_tool(name)
    before = sys.argv
    sys.argv = [f'{name}.py', *map(str, arguments)]
    try:
        tool.launch.run_tool(tool.main)
    except SystemExit as end:
        return int(end.code)
    finally:
        sys.argv = before
    return 0


# --- reading -------------------------------------------------------------------------------------


def read_scalars(work_dir: Path | str) -> list[dict[str, Any]]:
    """The newest run's ``vis_data/scalars.json``: one row an iteration or evaluation."""
    newest = max(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in newest.read_text().splitlines()]


def read_losses(work_dir: Path | str) -> list[dict[str, Any]]:
    """The rows of training iterations, without what depends on the clock."""
    rows = [row for row in read_scalars(work_dir) if 'loss' in row]
    return [{k: v for k, v in row.items() if k not in ('time', 'data_time')} for row in rows]


def read_log(work_dir: Path | str) -> str:
    """The newest run's log, as text."""
    return max(Path(work_dir).glob('*/*.log')).read_text()


def read_layers(work_dir: Path | str) -> list[dict[str, str]]:
    """``slope_layers.csv``."""
    with (Path(work_dir) / 'slope_layers.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def steps_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the learned steps."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if re.search(r'\bslope_', name)
    }


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the masks of all sparse layers."""
    layers = slope_mm.compressed_layers(model).items()
    return {name: layer.mask.clone() for name, layer in layers if layer.mask is not None}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The keys whose tensors are not bit for bit the same, or are only on one side."""
    keys = a.keys() | b.keys()
    return sorted(k for k in keys if k not in a or k not in b or not torch.equal(a[k], b[k]))


# --- a model whose loss is a mean over images, so that batches can be split ----------------------


@MODELS.register_module(force=True)
class ToyNet(BaseModel):
    """A convolution, one that is used twice, a linear layer, and (unused) a spare one."""

    def __init__(self, spare: bool = False, norm_eval: bool = True, init_cfg: Any = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.norm_eval = norm_eval
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        if spare:
            self.spare = nn.Conv2d(8, 8, 1)

    def train(self, mode: bool = True) -> ToyNet:
        super().train(mode)
        if self.norm_eval:
            self.norm.eval()
        return self

    def forward(self, image: list[Tensor], target: list[Tensor], mode: str = 'tensor') -> Any:
        x = torch.relu(self.norm(self.first(torch.stack(list(image)))))
        x = self.twice(torch.relu(self.twice(x)))
        out = self.mix(x.mean((2, 3)))
        if mode != 'loss':
            return out
        return {'loss': (out - torch.stack(list(target))).square().mean()}


@MODELS.register_module(force=True)
class BranchNet(ToyNet):
    """A toy model with a branch that the loss takes no notice of, at first or ever.

    Args:
        ignored: Ever: the branch runs, but only what it gives as a number to log is kept.
            Otherwise it gets an empty batch twice (as a head without regions does), then all.
    """

    def __init__(self, ignored: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.ignored, self.seen = ignored, 0
        self.branch = nn.Linear(8, 8)

    def forward(self, image: list[Tensor], target: list[Tensor], mode: str = 'tensor') -> Any:
        out = super().forward(image, target)
        self.seen += torch.is_grad_enabled()
        empty = mode == 'loss' and self.seen < 3 and not self.ignored
        beside = self.branch(out[:0] if empty else out)
        if mode != 'loss':
            return out if self.ignored else out + beside
        loss = (out - torch.stack(list(target))).square().mean()
        if self.ignored:
            return {'loss': loss, 'aside': beside.detach().mean()}
        return {'loss': loss, 'loss_branch': beside.square().sum() * 1e-3}


@DATASETS.register_module(force=True)
class ToyImages(torch.utils.data.Dataset):
    """Noise images and targets; odd images and the second half are four times as strong."""

    def __len__(self) -> int:
        # No run comes to the end: mmengine rests for two seconds there.
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(index)
        strength = 4 if index % 2 or index >= len(self) // 2 else 1
        return {
            'image': torch.randn(4, 6, 6, generator=noise) * strength,
            'target': torch.randn(8, generator=noise),
        }


@DATASETS.register_module(force=True)
class SpoiltImages(ToyImages):
    """Toy images of which some hold NaN (or another value), in the image or in its target."""

    def __init__(
        self, spoilt: tuple[int, ...] = (), key: str = 'image', value: Any = 'nan'
    ) -> None:
        self.spoilt, self.key, self.value = spoilt, key, value

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        if index in self.spoilt:
            item[self.key].view(-1)[3] = float(self.value)
        return item


def toy_config(work_dir: Path | str, batch_size: int = 4, **options: Any) -> Config:
    """A config that trains :class:`ToyNet` for two iterations of plain SGD, without a shuffle."""
    config = Config(
        dict(
            default_scope='mmengine',
            model=dict(type='slope_mm.SlopeModel', arch='ToyNet', recipe=TOY_RECIPE),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=0,
                dataset=dict(type='ToyImages'),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(
                constructor='slope_mm.SlopeOptimWrapperConstructor',
                optimizer=dict(type='SGD', lr=0.1),
                regularizer=dict(type='cosine', weight=2.0),
            ),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100),
            ),
            env_cfg=dict(dist_cfg=dict(backend='gloo')),
            randomness=dict(seed=0),
            log_processor=dict(by_epoch=False, window_size=1),
        )
    )
    config.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return name_run(config)
