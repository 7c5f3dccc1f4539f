"""Checkpoints of a real Runner, and how what was read from them compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn


class Net(BaseModel):
    def __init__(self, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 1)

    def forward(self, image: list[torch.Tensor], mode: str = 'tensor') -> Any:
        out = self.head(self.norm(self.conv(torch.stack(list(image)))).mean((2, 3)))
        return {'loss': out.square().mean()} if mode == 'loss' else out


class Images(torch.utils.data.Dataset):
    metainfo = {
        'classes': ('disc', 'square'),
        'palette': [(1, 2, 3), (4, 5, 6)],
        'keypoints': ConfigDict(left={'id': 0, 'swap': 'right'}, sizes=[1, 2]),
        'sigmas': np.arange(3, dtype=np.float32),
        'scale': np.float64(0.5),
    }

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(index)
        return {'image': torch.randn(1, 5, 5, generator=noise)}


def make_runner(work_dir: Path, iterations: int, **options: Any) -> Runner:
    torch.manual_seed(0)
    runner = Runner(
        model=Net(),
        work_dir=str(work_dir),
        train_dataloader={
            'batch_size': 2,
            'num_workers': 0,
            'dataset': Images(),
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        },
        train_cfg={'by_epoch': False, 'max_iters': iterations},
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler=[
            {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.5, 'end': 3},
            {'type': 'MultiStepLR', 'by_epoch': False, 'milestones': [1, 3]},
        ],
        default_hooks={
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {'type': 'CheckpointHook', 'by_epoch': False, 'interval': 2},
        },
        custom_hooks=[{'type': 'EMAHook', 'momentum': 0.1}],
        default_scope='mmengine',
        experiment_name=f'checkpoint_{uuid4().hex}',
        log_level='ERROR',
        **options,
    )
    torch.manual_seed(0)
    nn.init.normal_(runner.model.conv.weight)
    return runner


def unsafe(path: Path) -> Any:
    return torch.load(path, map_location='cpu', weights_only=False)


def spread(buffer: HistoryBuffer) -> float:
    return buffer.max() - buffer.min()
