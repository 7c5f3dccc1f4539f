"""Write what leaves training: a packed file, or a checkpoint of the stock model."""

from __future__ import annotations

import argparse
from typing import Any

from mmengine.config import Config, DictAction
from torch import nn

import slope_mm
from slope_mm.analysis.size import order0_bits
from slope_mm.engine import launch
from slope_mm.engine.packed import stock_config
from slope_mm.engine.stock import evaluate, quantized_inputs, save_stock
from slope_mm.packing import PackedFile
from slope_mm.packing.layout import CODINGS
from slope_mm.packing.writer import HALF_DTYPES, SMALLEST


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest='kind', required=True)
    packed = kinds.add_parser('packed', help='the smallest file, which slope_mm loads')
    packed.add_argument(
        '--coding',
        choices=[SMALLEST, *CODINGS],
        default=SMALLEST,
        help='how index and codes are written (default: per layer the smallest)',
    )
    packed.add_argument(
        '--dtype',
        choices=sorted(HALF_DTYPES),
        help='store steps, biases, BN and all that is not compressed in 2 bytes (changes outputs)',
    )
    stock = kinds.add_parser('stock', help='a checkpoint that stock mmdet loads, 4 bytes a weight')
    for sub in (packed, stock):
        sub.add_argument('config', help='config with a SlopeModel')
        sub.add_argument('checkpoint', help='checkpoint of that config, or a packed file')
        sub.add_argument('out', help='the file to write')
        sub.add_argument(
            '--fold-bn',
            action='store_true',
            help='fold batch norms into steps and one bias a channel: other rounding, same codes',
        )
        sub.add_argument(
            '--evaluate', action='store_true', help='print the metrics of the checkpoint and of OUT'
        )
        sub.add_argument(
            '--cfg-options', nargs='+', action=DictAction, help='override settings of the config'
        )
    return parser.parse_args()


def write_packed(args: argparse.Namespace, config: Config, model: nn.Module, meta: Any) -> None:
    told = {'config': stock_config(config), 'dataset_meta': meta.get('dataset_meta') or {}}
    size = slope_mm.save_packed(model, args.out, told, coding=args.coding, dtype=args.dtype)
    report = slope_mm.report(model)
    print(
        f'{args.out}: {size:,} bytes, {report.dense_bytes / size:.1f}x smaller than the'
        f" {report.dense_bytes:,} bytes of the stock model's tensors"
    )
    layers = PackedFile.open(args.out).layers.values()
    index_and_codes = sum(layer.payload.size - layer.layout.step_bytes for layer in layers)
    bound = sum(map(order0_bits, slope_mm.compressed_layers(model).values())) / 8
    print(
        f'Index and codes: {index_and_codes:,} bytes; no code without context gets below'
        f' {bound:,.0f} ({index_and_codes / bound - 1:+.2%})'
    )


def write_stock(args: argparse.Namespace, model: nn.Module, meta: Any) -> None:
    size = save_stock(model, args.out, {'dataset_meta': meta.get('dataset_meta') or {}})
    print(f'{args.out}: {size:,} bytes, weights as trained')
    lost = quantized_inputs(model)
    if lost:
        told = ', '.join(f'{count} layers to {bits} bits' for bits, count in sorted(lost.items()))
        print(
            f'Not in it: the input quantizers ({told}). The stock model computes with inputs at'
            ' full precision, another function than the trained one'
            + ('.' if args.evaluate else '; --evaluate prints the metrics of both.')
        )


def print_metrics(args: argparse.Namespace, config: Config) -> None:
    """A line for each metric: the checkpoint's and the written file's."""
    before = evaluate(config, args.checkpoint)
    after = evaluate(config, args.out, stock=args.kind == 'stock')
    print(f'{"metric":<28}{"checkpoint":>12}{args.kind:>12}')
    for name, value in before.items():
        print(f'{name:<28}{value:>12.4f}{after[name]:>12.4f}')


def main() -> None:
    args = parse_args()
    config = launch.read_config(args.config, args.cfg_options)
    if args.evaluate:
        launch.check_data(config.get('test_dataloader'), 'test_dataloader')
    model = launch.build_model(config)
    meta = launch.load_weights(model, args.checkpoint)
    if args.fold_bn:
        model = slope_mm.fold_batch_norms(model, inplace=True)
    if args.kind == 'packed':
        write_packed(args, config, model, meta)
    else:
        write_stock(args, model, meta)
    if args.evaluate:
        print_metrics(args, config)


if __name__ == '__main__':
    launch.run_tool(main)
