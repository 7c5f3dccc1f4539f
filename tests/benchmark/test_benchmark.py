"""Timings, memory and tables of benchmarks, against counts that are known beforehand."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config

from slope_mm.benchmark.detectors import (
    arm_config,
    build_arms,
    classes_of,
    evaluation_step,
    make_batch,
)
from slope_mm.benchmark.interleave import Spread, Timings, interleave
from slope_mm.benchmark.memory import peak_bytes
from slope_mm.benchmark.report import save, table
from slope_mm.engine.launch import read_config
from slope_mm.errors import ConfigError
from slope_mm.ops.fused import fused_enabled

SMALL = 'configs/mask_rcnn_r18_shapes_fp32.py'


def test_every_arm_runs_once_a_round_and_the_order_turns() -> None:
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in 'abc'}
    timings = interleave(arms, rounds=2, warmup=1)
    assert ''.join(calls) == 'abc' + 'bca' + 'cab'
    assert {name: len(values) for name, values in timings.seconds.items()} == dict(a=2, b=2, c=2)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down to half its speed leaves them alone."""
    timings = Timings(dict(stock=[1.0, 2.0, 1.0, 4.0], ours=[1.5, 3.0, 1.5, 6.0]))
    assert timings.ratio('ours', 'stock') == Spread(1.5, 1.5, 1.5)
    row = timings.rows('stock', size='x')[1]
    assert (row['arm'], row['size'], row['ratio'], row['ms']) == ('ours', 'x', 1.5, 2250.0)


def test_compiled_arms_are_evaluated_with_fused_kernels() -> None:
    asked: dict[str, bool] = {}
    arms = ['stock', 'W4', 'W4 compiled']
    built = build_arms(read_config(SMALL), arms)
    for arm, (model, config) in built.items():
        step = evaluation_step(model, config, make_batch(model, (64, 64), 1, 5))
        model.backbone.conv1.register_forward_hook(
            lambda module, args, out, arm=arm: asked.update({arm: fused_enabled(out)})
        )
        step()
    assert asked == {'stock': False, 'W4': False, 'W4 compiled': True}


PAGES = """
import resource, torch
from slope_mm.benchmark.interleave import keep_pages
kept = keep_pages()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(3 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
# The system may do something else in between, now and then.
print(int(kept), min(faults() for _ in range(60)))
"""


def test_freed_memory_is_kept_where_the_c_library_knows_how() -> None:
    """By the system's own count: four times 12 MiB on fresh pages of 4 KiB are 12,288 faults."""
    done = subprocess.run([sys.executable, '-c', PAGES], capture_output=True, text=True, check=True)
    # Packages may have something to say while they are imported.
    kept, faults = map(int, done.stdout.splitlines()[-1].split())
    assert kept == (platform.libc_ver()[0] == 'glibc')
    if kept:
        assert faults < 100


def test_spread_is_numpys_quartiles() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    spread = Spread.of(values)
    expected = np.quantile(values, [0.5, 0.25, 0.75])
    np.testing.assert_allclose([spread.median, spread.low, spread.high], expected)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_peak_is_what_is_held_at_once() -> None:
    def step() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.repeat(3)
        del second, third

    # 4,000 + 4,000, then 4,000 + 12,000 bytes.
    assert 16_000 <= peak_bytes(step, 'cpu') < 16_200


def test_tables_and_files_say_the_same(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(arm='stock', ms=1234.5, ratio=1.0), dict(arm='W4', ms=None)]
    assert table(rows).splitlines() == [
        '| arm   | ms   | ratio |',
        '|-------|------|-------|',
        '| stock | 1234 | 1.000 |',
        '| W4    |      |       |',
    ]
    content = json.loads(save(tmp_path / 'a' / 'b.json', 'train', rows, notes=[]).read_text())
    assert content['rows'] == rows
    assert content['machine']['torch'] == torch.__version__
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['b.json']


def test_arms_start_from_equal_weights_and_need_no_download() -> None:
    config = read_config(SMALL)
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    built = build_arms(config, ['stock', 'W4A4'])
    stock, ours = (model.state_dict() for model, _ in built.values())
    assert all(torch.equal(value, ours[name]) for name, value in stock.items())
    assert built['W4A4'][1].optim_wrapper.regularizer.type == 'cosine'
    assert classes_of(config) == 5


def test_bad_arms_are_refused() -> None:
    config = read_config(SMALL)
    with pytest.raises(ConfigError, match='choose from stock'):
        arm_config(config, 'W5')
    compressed = Config(dict(model=dict(type='x', recipe={})))
    with pytest.raises(ConfigError, match='stock model'):
        arm_config(compressed, 'W4')
