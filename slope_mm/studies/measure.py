"""What a finished trial reached: metrics, cosine, SQNR, size, bit operations, and their course."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch import nn

import slope_mm
from slope_mm.analysis.bops import count_operations
from slope_mm.analysis.report import report
from slope_mm.convert import compressed_layers
from slope_mm.engine import launch
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.regularization import Regularizer
from slope_mm.environment import usable_cores
from slope_mm.errors import SlopeError
from slope_mm.recipe import Recipe
from slope_mm.studies.digests import weights_digest
from slope_mm.studies.processes import ROOT, Launcher
from slope_mm.studies.study import Arm
from slope_mm.studies.trials import Trial

PACKAGES = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'pycocotools', 'slope_mm')
CURVES = {
    'cosine': 'slope_cosine_mean',
    'sqnr_db': 'slope_sqnr_db',
    'flip_rate': 'slope_flip_rate',
    'gradient_ratio': 'slope_gradient_ratio',
    'loss': 'loss',
}
PACKED = 'model.slope'
# mmengine's registries belong to the process, not to a thread.
_ONE_AT_A_TIME = threading.Lock()


def treatment(arm: Arm | None) -> dict[str, Any]:
    """What an arm does, as columns: pattern, bits, code set, regularizer, lambda, …"""
    if arm is None or arm.recipe is None:
        return {'sparsity': None, 'bits': None, 'activation_bits': None, 'regularizer': None}
    recipe, regularizer = Recipe.parse(arm.recipe), Regularizer.parse(arm.regularizer)
    weight = recipe.weight
    active = regularizer.type != 'none'
    return {
        'sparsity': None if weight.sparsity is None else weight.sparsity.name,
        'bits': weight.bits,
        'activation_bits': recipe.activation_bits,
        'codes': weight.codes,
        'step': weight.step,
        'gradient': recipe.gradient,
        'order': recipe.order,
        'regularizer': regularizer.type,
        'lambda': float(regularizer.weight) if active else 0.0,
        'granularity': regularizer.granularity if active else None,
        'regularizer_gradient': regularizer.gradient if active else None,
    }


#: What every evaluation leaves beside its metrics.
TIMES = {'data_time', 'time'}


def metrics_of(folder: Path, wanted: Mapping[str, str]) -> dict[str, float]:
    """The metrics of the newest tools/test.py run below a folder.

    Raises:
        SlopeError: If there are none, or one that is wanted is missing.
    """
    files = sorted(folder.glob('*/*.json'))
    if not files:
        raise SlopeError(f"the evaluation left no metrics in '{folder}'")
    found = json.loads(files[-1].read_text().splitlines()[-1])
    missing = [name for name in wanted.values() if name not in found]
    if len(missing) == len(wanted) and not found.keys() - TIMES:
        # What COCO's metric leaves where nothing at all was detected.
        return dict.fromkeys(wanted, 0.0)
    if missing:
        raise SlopeError(f'the evaluation has no {missing[0]!r}; it has {sorted(found)}')
    return {short: float(found[name]) for short, name in wanted.items()}


def curves_of(folder: Path) -> dict[str, list[float | None]]:
    """The course of cosine, SQNR, flip rate and loss over the iterations, also of resumed runs."""
    looks: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                # Killed while it wrote; the resumed run writes this iteration again.
                continue
            if 'loss' in row:
                looks[int(row.get('iter', row['step']))] = row
    iterations = sorted(looks)
    curves: dict[str, list[float | None]] = {'iter': list(iterations)}
    for short, name in CURVES.items():
        values = [looks[i].get(name, math.nan) for i in iterations]
        if any(math.isfinite(value) for value in values):
            # JSON has no NaN.
            curves[short] = [float(f'{v:.5g}') if math.isfinite(v) else None for v in values]
    return curves


def can_weigh(trial: Trial, row: Mapping[str, Any]) -> bool:
    """Whether a calculated size can be replaced by a file's length now."""
    return (
        row['bytes_from'] == 'calculated'
        and row['regularizer'] is not None
        and hasattr(slope_mm, 'save_packed')
        and trial.weights.exists()
    )


def measured(trial: Trial) -> dict[str, Any]:
    """Cosine, SQNR, size and bit operations of a trial's model.

    The size is the packed file's length where this slope_mm can write one, and calculated
    otherwise; ``bytes_from`` says which.
    """
    with _ONE_AT_A_TIME:
        model = launch.build_model(trial.config)
        launch.load_weights(model, str(trial.weights))
        result = report(model)
        totals = result.totals
        save = getattr(slope_mm, 'save_packed', None)
        size, source = result.stored_bytes, 'calculated'
        if save is not None and compressed_layers(model):
            path = trial.folder / PACKED
            save(model, path)
            size, source = path.stat().st_size, 'file'
        return {
            'cosine': totals['cosine_mean'],
            'cosine_worst': totals['cosine_worst'],
            'sqnr_db': totals['sqnr_db'],
            'bytes': size,
            'bytes_from': source,
            'dense_bytes': result.dense_bytes,
            **_operations(model, trial.config),
        }


@torch.no_grad()
def _operations(model: nn.Module, config: Config) -> dict[str, float]:
    """GMACs and GBOPs of the first test image."""
    init_default_scope(config.get('default_scope') or 'mmdet')
    loader = config.test_dataloader
    dataset = DATASETS.build(loader.dataset)
    collate = Runner.build_dataloader(
        {'dataset': dataset, 'sampler': {'type': 'DefaultSampler'}, 'batch_size': 1}
    ).collate_fn
    model.eval()
    counted = count_operations(model, lambda: model.test_step(collate([dataset[0]])))  # type: ignore[operator]
    return {'gmacs': counted.macs / 1e9, 'gbops': counted.bops / 1e9}


def start_digest(trial: Trial) -> str | None:
    """Digest of the weights that a trial starts from; None from scratch, or from a web address."""
    start = trial.config.get('load_from')
    there = start is not None and Path(start).expanduser().is_file()
    return weights_digest(start) if there else None


def keep_weights(checkpoint: Path, target: Path) -> None:
    """Writes a checkpoint without the optimizer's state, and removes the others beside it."""
    loaded = load_checkpoint_file(str(checkpoint))
    kept = {key: loaded[key] for key in ('meta', 'state_dict') if key in loaded}
    partial = target.with_name(target.name + '.part')
    torch.save(kept, partial)
    partial.replace(target)
    for path in target.parent.glob('*_[0-9]*.pth'):
        path.unlink()
    (target.parent / 'last_checkpoint').unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and the commit."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found['slope_mm'] = slope_mm.__version__
    git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--exclude', '*']
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return found
    if done.returncode == 0:
        found['commit'] = done.stdout.strip()
    return found


def machine(launcher: Launcher) -> dict[str, Any]:
    """What the trials run on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        'system': platform.system(),
        'processor': _processor(),
        'cores': usable_cores(),
        'gpus': gpus,
        'launcher': launcher.kind,
        'processes': launcher.processes,
        'threads': launcher.threads,
    }


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.machine()
