"""Compress a trained detector without training: steps and ranges from a few images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import slope_mm  # noqa: F401 - registers the plug-ins and the safe checkpoint loader
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.engine.data_files import check_data
from slope_mm.engine.stock import evaluate
from slope_mm.errors import ConfigError
from slope_mm.oneshot.command import compress, save_start, table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config with a SlopeModel')
    parser.add_argument('checkpoint', help='its dense start: a checkpoint of the stock model')
    parser.add_argument('out', type=Path, help='the checkpoint to write')
    parser.add_argument(
        '--compensate',
        action='store_true',
        help='choose masks and codes so that each layer makes up for its own errors, as SparseGPT'
        ' and GPTQ do; otherwise by magnitude and to the nearest',
    )
    parser.add_argument(
        '--batches',
        type=int,
        default=4,
        help='training batches to calibrate with; as many others measure the errors (default:'
        ' %(default)s)',
    )
    parser.add_argument(
        '--memory',
        type=int,
        default=512,
        help='MiB of second moments of inputs that are held at once (default: %(default)s)',
    )
    parser.add_argument('--evaluate', action='store_true', help='print the metrics of OUT')
    parser.add_argument('--force', action='store_true', help='replace OUT where it exists')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.out.exists() and Path(args.checkpoint).exists() and args.out.samefile(args.checkpoint):
        raise ConfigError(f"'{args.out}' is the dense start itself; choose another name")
    there = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"'{args.out}' cannot be written: '{there}' is no folder to write to; choose another"
            ' place'
        )
    if args.out.exists() and not args.force:
        raise ConfigError(f"'{args.out}' is there already; choose another name or add --force")
    for name in ('batches', 'memory'):
        if getattr(args, name) < 1:
            raise ConfigError(f'--{name} {getattr(args, name)} is less than 1')
    config = launch.read_config(args.config, args.cfg_options)
    check_data(config.get('train_dataloader'), 'train_dataloader')
    if args.evaluate:
        check_data(config.get('test_dataloader'), 'test_dataloader')
    model, meta, results = compress(
        config,
        args.checkpoint,
        compensated=args.compensate,
        batches=args.batches,
        memory=args.memory * 2**20,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_start(model, args.out, meta)
    print(table(results))
    print(f'\nWrote {args.out}')
    if args.evaluate:
        for metric, value in evaluate(config, str(args.out)).items():
            print(f'{metric}: {value:.4f}')


if __name__ == '__main__':
    launch.run_tool(main)
