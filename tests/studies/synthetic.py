"""Results of studies that never ran: numbers from a formula, complete in their form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slope_mm.ops import parse_pattern
from slope_mm.studies.measure import treatment
from slope_mm.studies.results import Results
from slope_mm.studies.study import Arm, Study, Task

VERSIONS = {'python': '3.11.7', 'torch': '2.13.0', 'mmdet': '3.3.0', 'slope_mm': '0.1.0'}
MACHINE = {
    'system': 'Linux',
    'processor': 'a processor',
    'cores': 2,
    'gpus': [],
    'launcher': 'none',
    'processes': 1,
    'threads': 1,
}


def synthetic_row(task: Task, arm: Arm, seed: int, index: int) -> dict[str, Any]:
    """A row as the runner writes it."""
    noise = np.random.default_rng([seed, index])
    done = treatment(arm)
    pattern = None if done['sparsity'] is None else parse_pattern(done['sparsity'])
    density = 1.0 if pattern is None else pattern.density
    bits = done['bits'] or 32
    loss = 0.12 * (1 - density) ** 2 + 0.2 / bits**1.5 * (bits < 32)
    lam = done.get('lambda') or 0.0
    gain = 0.02 * math.exp(-((math.log10(lam) - 0.5) ** 2)) if lam else 0.0
    accuracy = 0.55 - loss + gain + 0.01 * noise.standard_normal()
    compressed = done['regularizer'] is not None
    iterations = list(range(25, 275, 25))
    cosine = 0.99 - loss + 0.02 * gain
    curves: dict[str, list[float | None]] = {'iter': list(iterations), 'loss': [1.0] * 10}
    if compressed:
        curves['cosine'] = [
            cosine + (1 - cosine) * 0.3 * lam / (lam + 3) * i / 250 for i in iterations
        ]
        curves['sqnr_db'] = [-10 * math.log10(max(2 * (1 - c), 1e-9)) for c in curves['cosine']]
        curves['flip_rate'] = [None] + [0.02 * math.exp(-i / 80) for i in iterations[1:]]
    dense = 5_670_000
    share = density * bits / 32 + (0.03 if pattern is not None else 0.0)
    return {
        'task': task.name,
        'arm': arm.name,
        'seed': seed,
        **{name: round(accuracy - 0.02 * i, 3) for i, name in enumerate(task.metrics)},
        'cosine': cosine if compressed else None,
        'cosine_worst': cosine - 0.05 if compressed else None,
        'sqnr_db': 12.0 if compressed else None,
        'bytes': int(dense * (0.02 + 0.98 * share)) if compressed else dense,
        'bytes_from': 'calculated',
        'dense_bytes': dense,
        'gmacs': 0.9,
        'gbops': 0.9 * density * bits * (done['activation_bits'] or 32),
        **done,
        'curves': curves,
        'config_hash': f'{index:08x}{seed:08x}',
        'schedule_hash': 'same',
        'versions': VERSIONS,
        'machine': MACHINE,
        'wall_s': 150.0,
        'train_s': 130.0,
        'test_s': 20.0,
    }


def synthetic_results(study: Study) -> Results:
    """Rows of all trials of a study."""
    results = Results(study.name)
    for task in study.tasks:
        for index, arm in enumerate(study.arms):
            for seed in study.seeds(task, arm):
                results.rows.append(synthetic_row(task, arm, seed, index))
    return results
