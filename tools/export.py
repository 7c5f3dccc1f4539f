"""Write what leaves training: a packed file, a checkpoint of the stock model, or ONNX graphs."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

import slope_mm
from slope_mm.analysis.size import order0_bits
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.engine.data_files import check_data
from slope_mm.engine.packed import stock_config
from slope_mm.engine.stock import evaluate, is_baked, quantized_inputs, save_stock
from slope_mm.errors import ExportError, SlopeError
from slope_mm.export.folder import check_target
from slope_mm.export.hardware import hardware_table
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
    onnx = kinds.add_parser('onnx', help='graphs of the heavy parts, which ONNX Runtime runs')
    onnx.add_argument(
        '--int4',
        action='store_true',
        help='store weights that fit in 4 bits as int4 in the portable graphs (opset 21)',
    )
    onnx.add_argument(
        '--num-images', type=int, default=2, help='images of the test set that the gate looks at'
    )
    onnx.add_argument('--images', nargs='+', default=[], help='image files to take instead')
    check = kinds.add_parser('check', help='print which layers sparse hardware can run')
    for sub in (packed, stock, onnx, check):
        sub.add_argument('config', help='config with a SlopeModel')
        sub.add_argument('checkpoint', help='checkpoint of that config, or a packed file')
        sub.add_argument(
            '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
        )
    onnx.add_argument('out', help='the folder to write')
    onnx.add_argument(
        '--evaluate',
        action='store_true',
        help='refuse to write unless the metrics of checkpoint and export agree within 0.001',
    )
    for sub in (packed, stock):
        sub.add_argument('out', help='the file to write')
        sub.add_argument(
            '--fold-bn',
            action='store_true',
            help='fold batch norms into steps and one bias a channel: other rounding, same codes',
        )
        sub.add_argument(
            '--evaluate', action='store_true', help='print the metrics of the checkpoint and of OUT'
        )
    return parser.parse_args()


def check_out(args: argparse.Namespace) -> None:
    """Refuses to write over anything but an earlier file of the same kind.

    Raises:
        ExportError: If OUT is something else.
    """
    if args.kind == 'check':
        return
    if args.kind == 'onnx':
        check_target(args.out)
        return
    out = Path(args.out)
    if not out.is_file():
        return
    if Path(args.checkpoint).exists() and out.samefile(args.checkpoint):
        raise ExportError(f"'{out}' is the checkpoint itself; give another OUT")
    with contextlib.suppress(SlopeError):
        if is_baked(args.out) if args.kind == 'stock' else PackedFile.open(args.out):
            return
    known = 'a stock checkpoint that was exported' if args.kind == 'stock' else 'a packed file'
    raise ExportError(f"'{out}' exists and is not {known}; give another OUT, or remove it")


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


def write_onnx(args: argparse.Namespace, config: Config, model: nn.Module, meta: Any) -> None:
    # Not above: the other kinds need neither onnx nor onnxruntime.
    from slope_mm.export import require_runtime

    require_runtime()
    from slope_mm.export.gate import judge_metrics
    from slope_mm.export.images import image_batches
    from slope_mm.export.writer import export_onnx

    if args.num_images < 1:
        raise ExportError(f'--num-images {args.num_images} is no number of images >= 1')
    batches = image_batches(config, args.num_images, args.images)
    metrics: dict[str, dict[str, float]] = {}

    def judge(folder: Path) -> dict[str, dict[str, float]]:
        metrics.update(
            checkpoint=evaluate(config, args.checkpoint),
            onnx=evaluate(config, str(folder), backend='onnxruntime'),
        )
        judge_metrics(metrics['checkpoint'], metrics['onnx'])
        return metrics

    index = export_onnx(
        model,
        args.out,
        batches,
        meta.get('dataset_meta'),
        int4=args.int4,
        judge=judge if args.evaluate else None,
    )
    for part in index.parts:
        facts = index.facts['gate'][part.name]
        size = (Path(args.out) / part.portable).stat().st_size
        products = ', '.join(f'{n} {kind}' for kind, n in facts['operators'].items())
        print(
            f'{args.out}/{part.portable}: {size:,} bytes. ONNX Runtime runs {part.cpu} with'
            f' {products}. Largest output error {max(facts["output_error"].values()):.1e};'
            f' {facts["input_codes_compared"]:,} input codes equal'
        )
    if metrics:
        print_table(metrics['checkpoint'], metrics['onnx'], 'onnx')


def print_table(before: dict[str, float], after: dict[str, float], kind: str) -> None:
    print(f'{"metric":<28}{"checkpoint":>12}{kind:>12}')
    for name, value in before.items():
        # Without a single detection there are no metrics.
        print(f'{name:<28}{value:>12.4f}{after.get(name, 0.0):>12.4f}')


def print_metrics(args: argparse.Namespace, config: Config) -> None:
    """A line for each metric: the checkpoint's and the written file's."""
    before = evaluate(config, args.checkpoint)
    after = evaluate(config, args.out, backend='stock' if args.kind == 'stock' else None)
    print_table(before, after, args.kind)


def main() -> None:
    args = parse_args()
    check_out(args)
    config = launch.read_config(args.config, args.cfg_options)
    if getattr(args, 'evaluate', False):
        check_data(config.get('test_dataloader'), 'test_dataloader')
    model = launch.build_model(config)
    meta = launch.load_weights(model, args.checkpoint)
    if getattr(args, 'fold_bn', False):
        model = slope_mm.fold_batch_norms(model, inplace=True)
    if args.kind == 'packed':
        write_packed(args, config, model, meta)
    elif args.kind == 'stock':
        write_stock(args, model, meta)
    elif args.kind == 'onnx':
        write_onnx(args, config, model, meta)
    else:
        print(hardware_table(model))
    if args.kind in ('packed', 'stock') and args.evaluate:
        print_metrics(args, config)


if __name__ == '__main__':
    launch.run_tool(main)
