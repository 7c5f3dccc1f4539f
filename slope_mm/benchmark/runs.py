"""The benchmarks by name: each takes the tool's settings and returns rows and notes."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config

from slope_mm.benchmark import detectors
from slope_mm.benchmark.interleave import Spread, interleave, keep_pages
from slope_mm.benchmark.kernels import kernel_times, memory_bandwidth
from slope_mm.benchmark.memory import peak_bytes
from slope_mm.benchmark.weights import SHAPE, WEIGHT_BYTES, WEIGHT_KERNELS, layer_arms
from slope_mm.convert import compressed_layers, convert
from slope_mm.errors import ConfigError
from slope_mm.layers import CompressedLayer

Progress = Callable[[str], None]
Result = tuple[list[dict[str, Any]], list[str]]


def _steps(args: Namespace, config: Config) -> dict[str, detectors.TrainingStep]:
    """Training steps of the arms; the models live in them."""
    built = detectors.build_arms(config, args.arms, args.device)
    first = next(iter(built.values()))[0]
    batch = detectors.make_batch(first, tuple(args.size), args.batch, detectors.classes_of(config))
    return {arm: detectors.TrainingStep(*pair, batch) for arm, pair in built.items()}


def train(args: Namespace, progress: Progress) -> Result:
    """Training steps in turn; the first arm is the baseline.

    On a GPU also how long its kernels are busy: the rest of a step waits for Python.
    """
    steps = _steps(args, detectors.read_stock(args.config))
    timings = interleave(steps, args.rounds, progress=progress)
    rows = timings.rows(args.arms[0], config=args.config, size=_size(args), batch=args.batch)
    if torch.device(args.device).type == 'cuda':
        spreads = kernel_times(steps, 3, calls=1)
        least = spreads[args.arms[0]].median
        for row in rows:
            busy = spreads[row['arm']].median
            row.update(kernels_ms=1e3 * busy, kernels_ratio=busy / least)
    return rows, []


def evaluate(args: Namespace, progress: Progress) -> Result:
    """Evaluation steps in turn; the models are not baked."""
    config = detectors.read_stock(args.config)
    built = detectors.build_arms(config, args.arms, args.device)
    first = next(iter(built.values()))[0]
    batch = detectors.make_batch(first, tuple(args.size), args.batch, detectors.classes_of(config))
    for model, _ in built.values():
        detectors.calibrate_on(model, batch)
    steps = {arm: detectors.evaluation_step(*pair, batch) for arm, pair in built.items()}
    timings = interleave(steps, args.rounds, progress=progress)
    return timings.rows(args.arms[0], config=args.config, size=_size(args), batch=args.batch), []


def layer(args: Namespace, progress: Progress) -> Result:
    """One weight, forward and backward; ratios to 2:4, which has to do more than the peers.

    Memory that is freed is kept, for all arms alike.

    On a GPU also what its kernels take, of weights that come from memory and not from a cache, and
    the share of that time in which a copy would move the bytes that have to be moved.
    """
    on_gpu = torch.device(args.device).type == 'cuda'
    keeps = keep_pages()
    arms, skipped = layer_arms(args.device, cases=8 if on_gpu else 1)
    timings = interleave(arms, args.rounds)
    baseline = 'slope_mm 2:4 compiled'
    rows = timings.rows(baseline if baseline in arms else 'slope_mm 2:4', shape='512x512x3x3')
    notes = [f'skipped: {name}: {why}' for name, why in skipped.items()]
    if not keeps:
        notes.append('this C library may hand memory back: times hold the clearing of pages')
    if on_gpu:
        limit = memory_bandwidth(args.device)
        spreads = kernel_times(arms, args.rounds)
        # The regularizer's forty small kernels take longer than a single weight's two, and a whole
        # model asks for them once.
        fused = {name: run for name, run in arms.items() if name.endswith(detectors.COMPILED)}
        passes = kernel_times(fused, args.rounds, named=WEIGHT_KERNELS)
        needed = WEIGHT_BYTES * math.prod(SHAPE) / limit
        for row in rows:
            spread = spreads[row['arm']]
            row.update(
                kernels_us=1e6 * spread.median,
                kernels_us_low=1e6 * spread.low,
                kernels_us_high=1e6 * spread.high,
            )
            # Zero where Triton's kernels did not run.
            own = passes[row['arm']].median if row['arm'] in passes else 0.0
            row.update(
                pass_us=1e6 * own or None,
                pass_ratio=own / passes[baseline].median if own else None,
                of_bandwidth=needed / own if own else None,
            )
        notes.append(f'a copy of 1 GiB moved {limit / 1e9:.0f} GB/s, read and written')
    return rows, notes


def memory(args: Namespace, progress: Progress) -> Result:
    """Peak bytes of a step: model, gradients, optimizer state, and what comes and goes."""
    config = detectors.read_stock(args.config)
    rows: list[dict[str, Any]] = []
    baseline = 0
    for arm in args.arms:
        # One model at a time: each arm starts from the same memory.
        alone = Namespace(**{**vars(args), 'arms': [arm]})
        built = detectors.build_arms(config, [arm], args.device)
        weights = detectors.parameter_bytes(built[arm][0])
        del built
        (step,) = _steps(alone, config).values()
        peak = step.standing_bytes() + peak_bytes(step, args.device)
        baseline = baseline or peak
        rows.append(
            dict(
                config=args.config,
                size=_size(args),
                batch=args.batch,
                arm=arm,
                peak_mb=peak / 1e6,
                ratio=peak / baseline,
                more_in_weights=(peak - baseline) / weights,
            )
        )
        progress(f'{arm}: {peak / 1e6:.0f} MB')
        del step
        gc.collect()
    return rows, ['more_in_weights: bytes above the baseline, in units of the weights (fp32)']


def passes(args: Namespace, progress: Progress) -> Result:
    """Where a step's extra time goes: every W4 layer's pass over its weight, by kind of kernel."""
    config = detectors.read_stock(args.config)
    model, _ = detectors.build_arms(config, ['W4'], args.device)['W4']
    layers = compressed_layers(model).values()
    spent: dict[str, list[float]] = {}
    for layer in layers:
        kernel = 'x'.join(map(str, layer.weight.shape[2:])) or 'linear'
        forward, backward = (Spread.of(t).median for t in _pass_times(layer, args.rounds))
        totals = spent.setdefault(kernel, [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, layer.weight.numel(), forward, backward)):
            totals[i] += value
    total = [sum(values) for values in zip(*spent.values(), strict=True)]
    rows = [
        dict(
            kernel=kernel,
            layers=int(count),
            weights=int(weights),
            forward_ms=1e3 * forward,
            backward_ms=1e3 * backward,
            forward_ns=1e9 * forward / weights,
            backward_ns=1e9 * backward / weights,
        )
        for kernel, (count, weights, forward, backward) in {**spent, 'all': total}.items()
    ]
    return rows, ['ns: per weight']


def _pass_times(layer: CompressedLayer, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a layer's forward and backward pass over its weight, both outputs asked for."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 1):
        layer.zero_grad()
        start = time.perf_counter()
        with layer.shared():
            outputs = [layer.compressed_weight(), layer.weight_powers()]
        middle = time.perf_counter()
        upstream = [torch.ones_like(output) for output in outputs]
        begin = time.perf_counter()
        torch.autograd.backward(outputs, upstream)
        # The first time initialises steps and buffers.
        if index:
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - begin)
    return times


def scale(args: Namespace, progress: Progress) -> Result:
    """The train benchmark at three depths and three image sizes."""
    rows: list[dict[str, Any]] = []
    height, width = args.size
    points = [(depth, (height, width)) for depth in (18, 50, 101)]
    points += [(50, (int(height * f), int(width * f))) for f in (0.5, 2.0)]
    for depth, size in points:
        config = detectors.read_stock(args.config)
        backbone = config.model.backbone
        if backbone.type != 'ResNet' or backbone.get('base_channels', 64) != 64:
            raise ConfigError(
                f"scale varies the depth of a ResNet of usual width; '{args.config}' has none"
            )
        config.model.backbone.depth = depth
        if depth == 18:
            config.model.neck.in_channels = [64, 128, 256, 512]
        here = Namespace(**{**vars(args), 'size': size})
        steps = _steps(here, config)
        timings = interleave(steps, args.rounds)
        rows += timings.rows(args.arms[0], depth=f'R{depth}', size=_size(here), batch=args.batch)
        progress(f'R{depth} {_size(here)} done')
        del steps
        gc.collect()
    return rows, []


_IMPORT = 'import mmdet.models, mmdet.apis, time; a = time.perf_counter(); import slope_mm, sys;'


def setup(args: Namespace, progress: Progress) -> Result:
    """Seconds of ``import slope_mm`` after mmdet (in new processes), and of a conversion."""
    imports = []
    for _ in range(args.rounds):
        command = [sys.executable, '-c', _IMPORT + ' print(time.perf_counter() - a)']
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        imports.append(float(ran.stdout.split()[-1]))
        progress(f'import {imports[-1]:.3f} s')
    conversions = []
    config = detectors.read_stock(args.config)
    for _ in range(args.rounds):
        model = detectors.build_arms(config, ['stock'])['stock'][0]
        start = time.perf_counter()
        convert(model, detectors.ARMS['W4A4'] or {})
        conversions.append(time.perf_counter() - start)
    rows = []
    for what, values in (('import slope_mm', imports), (f'convert {args.config}', conversions)):
        spread = Spread.of(values)
        rows.append(dict(what=what, s=spread.median, s_low=spread.low, s_high=spread.high))
    return rows, []


def _size(args: Namespace) -> str:
    return 'x'.join(str(side) for side in args.size)


def inference(args: Namespace, progress: Progress) -> Result:
    """See :mod:`slope_mm.benchmark.inference`, which needs the export extra."""
    from slope_mm.benchmark.inference import inference as run

    return run(args, progress)


BENCHMARKS: dict[str, Callable[[Namespace, Progress], Result]] = {
    'train': train,
    'eval': evaluate,
    'layer': layer,
    'memory': memory,
    'passes': passes,
    'scale': scale,
    'setup': setup,
    'inference': inference,
}
