"""Print how large packed files are, how close to calculation and bound, and how fast.

Weights and norms are drawn at random, so that no checkpoint is needed. Files are written to a
temporary folder; their lengths are what is printed.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmdet.datasets import CocoDataset
from mmdet.models.backbones import ResNet
from torch import Tensor, nn

import slope_mm
from slope_mm.analysis.size import layer_bits, order0_bits
from slope_mm.engine import launch
from slope_mm.engine.packed import stock_model

MASK_RCNN = 'configs/mask_rcnn_r50_fp32.py'
RECIPES = [('2:4', 4), ('2:4', 2), ('2:8', 4), ('2:8', 2), ('2:16', 4)]


class ResNet18(nn.Module):
    """mmdet's ResNet-18 with the ImageNet classifier (11,689,512 parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet(18, frozen_stages=-1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def mask_rcnn() -> nn.Module:
    config = launch.read_config(MASK_RCNN)
    model = launch.build_model(config)
    # What the header of an exported file carries.
    model.slope_config = stock_model(config.model.to_dict())
    model.dataset_meta = CocoDataset.METAINFO
    return model


def randomise(model: nn.Module, kind: str) -> None:
    """Fills a model with weights that look trained, and norms of which no two channels agree."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.empty_like(parameter)
        if kind == 'laplace':
            drawn.exponential_(generator=generator)
            drawn *= torch.empty_like(drawn).bernoulli_(0.5, generator=generator) * 2 - 1
        else:
            drawn.normal_(generator=generator)
        parameter.data = drawn * 0.02
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and 'running' in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif 'num_batches_tracked' in name:
            buffer.fill_(7330)


class PeakMemory(threading.Thread):
    """The most resident memory that a piece of work adds, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = self.peak = self.resident()
        self.over = False
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over = True
        self.join()

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.001)

    @staticmethod
    def resident() -> int:
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


def measure(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds and added bytes."""
    with PeakMemory(daemon=True) as memory:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return seconds, memory.peak - memory.before


def sizes(build: Callable[[], nn.Module], kind: str, rules: list[dict]) -> None:
    """A row for each recipe."""
    header = (
        'recipe',
        'BN',
        'calculated',
        'bitmask',
        'enumerative',
        'entropy',
        'to bound',
        'ratio',
    )
    print('  '.join(f'{title:>12}' for title in header))
    for sparsity, bits in RECIPES:
        dense = build()
        randomise(dense, kind)
        recipe = dict(weight=dict(sparsity=sparsity, bits=bits), rules=rules)
        model = slope_mm.convert(dense, recipe).eval()
        for layer in slope_mm.compressed_layers(model).values():
            # Found once instead of for every file.
            layer.hold_mask()
        for folded in (False, True):
            if folded:
                slope_mm.fold_batch_norms(model, inplace=True)
            print('  '.join(f'{cell:>12}' for cell in row(model, f'{sparsity}+{bits}b', folded)))


def row(model: nn.Module, recipe: str, folded: bool) -> list[str]:
    report = slope_mm.report(model)
    calculated = report.stored_bytes
    if folded:
        # Of a folded norm only the bias is left.
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        calculated -= sum(12 * norm.num_features + 8 for norm in norms)
    lengths = {}
    with tempfile.TemporaryDirectory() as folder:
        for coding in ('bitmask', 'enumerative', 'entropy'):
            path = Path(folder) / coding
            slope_mm.save_packed(model, path, coding=coding)
            lengths[coding] = path.stat().st_size
    layers = slope_mm.compressed_layers(model).values()
    bound = (
        calculated
        + sum(
            order0_bits(layer) - (bits := layer_bits(layer)).codes - bits.index for layer in layers
        )
        / 8
    )
    return [
        recipe,
        'folded' if folded else 'as trained',
        f'{calculated:,}',
        *(f'{length:,}' for length in lengths.values()),
        f'{lengths["entropy"] / bound - 1:+.2%}',
        f'{report.dense_bytes / lengths["entropy"]:.1f}x',
    ]


def speed() -> None:
    """Seconds and memory of writing and loading Mask R-CNN R50."""
    config = launch.read_config('configs/mask_rcnn_r50_slope_w4.py')
    model = launch.build_model(config)
    randomise(model, 'normal')
    for layer in slope_mm.compressed_layers(model).values():
        layer.initialise_step()
    fp32 = slope_mm.report(model).dense_bytes
    print(f'Mask R-CNN R50 2:4+4b, {torch.get_num_threads()} threads; fp32 {fp32:,} bytes')
    with tempfile.TemporaryDirectory() as folder:
        for coding in ('enumerative', 'entropy', 'smallest'):
            path, fresh = Path(folder) / coding, launch.build_model(config)
            for what, work in (
                ('save_packed', partial(slope_mm.save_packed, model, path, coding=coding)),
                ('load_packed', partial(slope_mm.load_packed, path, fresh)),
                ('read_packed', partial(slope_mm.read_packed, path)),
            ):
                seconds, added = measure(work)
                # The model itself is in memory before.
                peak = added / fp32 + (what != 'read_packed')
                print(f'{coding:<12}{what:<12}{seconds:>6.2f} s  peak {peak:.2f} x fp32')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=['mask_rcnn', 'resnet18', 'speed'])
    parser.add_argument('--weights', choices=['normal', 'laplace'], default='normal')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.what == 'speed':
        speed()
    elif args.what == 'mask_rcnn':
        sizes(mask_rcnn, args.weights, [])
    else:
        edge = dict(weight=dict(sparsity=None, bits=8))
        for where, rules in (('8 bits', [dict(match='fc', **edge)]), ('as the recipe', [])):
            print(f'ResNet-18, stem at 8 bits, classifier: {where}')
            sizes(ResNet18, args.weights, rules)


if __name__ == '__main__':
    launch.run_tool(main)
