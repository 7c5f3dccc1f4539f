"""Train a detector: mmdet's tools/train.py with SLOPE's plug-ins and checks in place."""

from __future__ import annotations

import argparse
import os

from mmdet.utils import setup_cache_size_limit_of_dynamo

import slope_mm  # noqa: F401 - registers the plug-ins and the safe checkpoint loader
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.engine.launchers import use_launcher


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file path')
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision (without a GPU: bfloat16)'
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='continue from a checkpoint, or (without a path) from the newest one in the work dir',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value pairs, nested keys with dots; lists as'
        ' key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed passes --local-rank or, before torch 2.0, --local_rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    config = launch.read_config(args.config, args.cfg_options)
    use_launcher(config, args.launcher)
    launch.set_work_dir(config, args.config, args.work_dir)
    if args.amp:
        launch.use_amp(config)
    if args.auto_scale_lr:
        launch.use_auto_scale_lr(config)
    launch.use_resume(config, args.resume)
    launch.check_before_training(config)
    runner = launch.build_runner(config)
    launch.warn_without_start(runner)
    runner.train()


if __name__ == '__main__':
    launch.run_tool(main)
