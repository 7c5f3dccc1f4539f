"""Give every layer a pattern and bits of its own, so that the model keeps a budget."""

from __future__ import annotations

import argparse
from pathlib import Path

import slope_mm  # noqa: F401 - registers the plug-ins and the safe checkpoint loader
from slope_mm.allocation.choices import BITS, PATTERNS
from slope_mm.allocation.command import Request, run
from slope_mm.allocation.quantities import parse_operations, parse_size
from slope_mm.allocation.sensitivity import MEASURES
from slope_mm.engine import launch
from slope_mm.engine.config_files import check_out
from slope_mm.engine.data_files import check_data
from slope_mm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config with a SlopeModel')
    parser.add_argument('checkpoint', help='its dense start: a checkpoint of the stock model')
    parser.add_argument('--size', help='what the packed file may take: 8MB, 512KiB, 8000000')
    parser.add_argument('--bops', help='bit operations of the first test image: 12.5G')
    parser.add_argument(
        '--measure',
        choices=MEASURES,
        default=MEASURES[0],
        help="what a choice costs: the error of a layer's output on calibration images, or of its"
        ' weight',
    )
    parser.add_argument(
        '--patterns',
        nargs='+',
        help="sparsity patterns to choose from; 'dense' is one (default: of"
        f' {", ".join(pattern or "dense" for pattern in PATTERNS)} those that fit the model)',
    )
    parser.add_argument(
        '--bits', nargs='+', type=int, default=list(BITS), help='default: %(default)s'
    )
    parser.add_argument(
        '--batches', type=int, default=4, help='calibration batches (default: %(default)s)'
    )
    parser.add_argument('-o', '--out', type=Path, required=True, help='the config to write')
    parser.add_argument('--force', action='store_true', help='replace OUT where it exists')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_out(args.out, args.config, args.force)
    if args.batches < 1:
        raise ConfigError(f'--batches {args.batches} is not a number of batches >= 1')
    config = launch.read_config(args.config)
    if args.measure == 'output':
        check_data(config.get('train_dataloader'), 'train_dataloader')
    request = Request(
        args.config,
        args.checkpoint,
        None if args.size is None else parse_size(args.size),
        None if args.bops is None else parse_operations(args.bops),
        args.measure,
        args.patterns and [None if pattern == 'dense' else pattern for pattern in args.patterns],
        args.bits,
        args.batches,
    )
    print(run(config, request, args.out))
    print(f'\nWrote {args.out}: python tools/train.py {args.out}')


if __name__ == '__main__':
    launch.run_tool(main)
