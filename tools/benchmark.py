"""Time of inference: stock PyTorch, the baked model, ONNX Runtime fp32, and our export."""

from __future__ import annotations

import argparse
import sys

import torch
from mmengine.logging import MMLogger

from slope_mm.benchmark.inference import inference
from slope_mm.benchmark.report import machine, save, table
from slope_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('benchmark', choices=['inference'])
    parser.add_argument(
        '--config',
        default='configs/mask_rcnn_r50_fp32.py',
        help='config of a stock detector or of a SlopeModel',
    )
    parser.add_argument('--checkpoint', help='of a SlopeModel; default: random weights')
    parser.add_argument(
        '--recipe', default='W4A4', help='what a stock config is compressed as (default: W4A4)'
    )
    parser.add_argument(
        '--sizes', nargs='+', type=size, default=[(320, 320), (640, 640)], metavar='HxW'
    )
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, default=1, help='equal for all arms')
    parser.add_argument('--out', help='json file; default work_dirs/benchmark/BENCHMARK.json')
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    return int(height), int(width)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    # A line a parameter about its initialisation says nothing about speed.
    MMLogger.get_instance('benchmark', log_level='WARNING')
    rows, notes = inference(args, lambda line: print(line, file=sys.stderr))
    print('\n'.join(f'{key}: {value}' for key, value in machine().items()))
    print(table(rows))
    for note in notes:
        print(note)
    out = args.out or f'work_dirs/benchmark/{args.benchmark}.json'
    print(f'saved to {save(out, args.benchmark, rows, command=sys.argv[1:], notes=notes)}')


if __name__ == '__main__':
    launch.run_tool(main)
