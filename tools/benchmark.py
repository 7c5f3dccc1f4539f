"""Time and memory of compressed training beside stock training, interleaved in one run.

train   a whole training step of a detector: stock, W4, W4A4
eval    an evaluation step of an unfrozen model
layer   one 512x512x3x3 weight through mask, quantizer and regularizer, beside other toolkits
memory  peak bytes of a training step
passes  where the extra time of a step goes: every layer's pass over its weight
scale   how the cost grows with parameters (R18, R50, R101) and with pixels
setup   import of slope_mm on top of mmdet, and conversion of the model
inference   stock PyTorch, the baked model, ONNX Runtime fp32 and our export, at each of --sizes
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from mmengine.logging import MMLogger

from slope_mm.benchmark import runs
from slope_mm.benchmark.report import machine, save, table
from slope_mm.engine import launch
from slope_mm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('benchmark', choices=list(runs.BENCHMARKS))
    parser.add_argument(
        '--config',
        default='configs/mask_rcnn_r50_fp32.py',
        help='config of a stock detector (also mmdet::...); the arms compress it themselves',
    )
    parser.add_argument('--arms', nargs='+', default=['stock', 'W4', 'W4A4'])
    parser.add_argument('--size', nargs=2, type=positive, default=[320, 320], metavar=('H', 'W'))
    parser.add_argument('--batch', type=positive, default=2, help='images in a batch')
    parser.add_argument('--rounds', type=positive, default=9)
    parser.add_argument('--threads', type=positive, default=1, help='for torch, equal for all arms')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--checkpoint', help='inference: of a SlopeModel; default: random weights')
    parser.add_argument(
        '--recipe', default='W4A4', help='inference: what a stock config is compressed as'
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        type=pair,
        default=[(320, 320), (640, 640)],
        metavar='HxW',
        help='inference: heights and widths',
    )
    parser.add_argument(
        '--out', help='json file; default work_dirs/benchmark/BENCHMARK_TIME.json, one a run'
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{number} is not at least 1')
    return number


def pair(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    return positive(height), positive(width)


def main() -> None:
    args = parse_args()
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f'--device {args.device}: torch finds no GPU here')
    torch.set_num_threads(args.threads)
    # A line a parameter about its initialisation says nothing about speed.
    MMLogger.get_instance('benchmark', log_level='WARNING')
    rows, notes = runs.BENCHMARKS[args.benchmark](args, lambda line: print(line, file=sys.stderr))
    print('\n'.join(f'{key}: {value}' for key, value in machine().items()))
    print(table(rows))
    for note in notes:
        print(note)
    out = args.out or f'work_dirs/benchmark/{args.benchmark}_{time.strftime("%Y%m%d_%H%M%S")}.json'
    print(f'saved to {save(out, args.benchmark, rows, command=sys.argv[1:], notes=notes)}')


if __name__ == '__main__':
    launch.run_tool(main)
