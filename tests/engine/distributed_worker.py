"""One of several processes of tests/engine/test_distributed.py: trains configs, saves what it saw.

Usage: python -m torch.distributed.run ... distributed_worker.py OUT CONFIG...
Each config names its launcher.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from mmengine.dist import get_rank

from slope_mm.engine import launch
from slope_mm.engine.launchers import use_launcher


class Snapshot(tiny.Observer):
    """Copies the state with which the first iteration begins."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 0:
            self.first = tiny.state_of(runner.model.module)


def main(out: str, *configs: str) -> None:
    torch.set_num_threads(1)
    for path in configs:
        config = launch.read_config(path)
        use_launcher(config, config.launcher)
        runner = launch.build_runner(config)
        snapshot = Snapshot()
        runner.register_hook(snapshot)
        runner.train()
        seen = {
            'wrapper': type(runner.model).__name__,
            'first': snapshot.first,
            'last': tiny.state_of(runner.model.module),
            'masks': tiny.masks_of(runner.model.module),
        }
        torch.save(seen, Path(out) / f'{Path(path).stem}_rank{get_rank()}.pt')
        if config.launcher != 'pytorch':
            # The next one makes a group of its own, elsewhere: a rank that is early would otherwise
            # meet the last group's store.
            torch.distributed.destroy_process_group()
            os.environ['MASTER_PORT'] = str(int(os.environ['MASTER_PORT']) + 1)


if __name__ == '__main__':
    main(*sys.argv[1:])
