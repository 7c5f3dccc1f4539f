"""The page: counts, reasons, and what it complains about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmdet
import pytest

from slope_mm.errors import ConfigError
from slope_mm.zoo.page import cause, complaints, write_page

GOOD: dict[str, Any] = dict(
    config='fcos/fcos_r50.py',
    folder='fcos',
    detector='FCOS',
    backbone='ResNet',
    status='runs',
    weights=32_000_000,
    compressed=1.0,
    sparse=0.95,
    dense_left=[],
    not_sparse=[
        ['prediction layer', 0.04, 'head'],
        ['6 input channels hold no 2:4: no sparsity', 0.006, 'a'],
        ['18 input channels hold no 2:4: no sparsity', 0.004, 'b'],
    ],
    shared=2,
    shared_kept=True,
    steps=140,
    steps_without_gradient=[],
    inputs_of_zeros=[],
    finite=True,
    baked='equal',
    packed='equal',
    ratio=11.7,
)
FAILED = dict(
    config='carafe/mask-rcnn.py',
    folder='carafe',
    detector='MaskRCNN',
    backbone='ResNet',
    status='dense fails',
    reason='RuntimeError: carafe_forward_impl: implementation for device cpu not found.',
)


def test_a_damaged_record_is_named_and_kept(tmp_path: Path) -> None:
    write_page(tmp_path, {GOOD['config']: GOOD})
    record = tmp_path / 'zoo.json'
    record.write_bytes(record.read_bytes()[:-40])
    before = record.read_bytes()
    for results in (None, {GOOD['config']: GOOD}):
        with pytest.raises(ConfigError, match=r'zoo\.json. cannot be read'):
            write_page(tmp_path, results)
    assert record.read_bytes() == before


def test_the_page_has_a_row_for_what_ran_and_a_reason_for_what_did_not(tmp_path: Path) -> None:
    offsets = {
        **GOOD,
        'config': 'dcn/dcn_r50.py',
        'folder': 'dcn',
        'compressed': 0.97,
        'dense_left': [['sampling offsets', 0.03, 'conv_offset']],
    }
    results = {row['config']: row for row in (GOOD, FAILED, offsets)}
    summary = write_page(tmp_path, results)
    page = (tmp_path / 'zoo.md').read_text()
    assert '2 dense twins run here; 2 of them also run compressed' in summary
    assert '2 of 2 have at least 98%' in summary
    assert '1 of them not counting sampling offsets' in summary
    assert '1 x needs a GPU' in summary
    row = next(line for line in page.splitlines() if line.startswith('| fcos_r50 '))
    assert '| 32.0 M | 100.00% | 95.00% |' in row
    assert 'prediction layer 4.00%, channels 1.00%' in row
    assert '140/140' in row
    assert 'carafe_forward_impl' in page


def test_a_limit_does_not_replace_what_has_run(tmp_path: Path) -> None:
    write_page(tmp_path, {GOOD['config']: GOOD})
    stopped = dict(FAILED, config=GOOD['config'], limited={'seconds': 1})
    assert '1 of them also run compressed' in write_page(tmp_path, {GOOD['config']: stopped})


def test_what_falls_short_is_listed_with_its_reason(tmp_path: Path) -> None:
    thin = {
        **GOOD,
        'config': 'new/new_r50.py',
        'compressed': 0.9,
        'dense_left': [['no compressed kind of NewConv', 0.1, 'neck']],
    }
    broken = {
        **FAILED,
        'config': 'bad/bad_r50.py',
        'status': 'fails',
        'reason': 'ValueError: bad',
    }
    write_page(tmp_path, {row['config']: row for row in (GOOD, thin, broken)})
    page = (tmp_path / 'zoo.md').read_text()
    short = page.split('## Short of the goal')[1].split('###')[0]
    assert 'new_r50: 90.00%; no compressed kind of NewConv 10.00%' in short
    assert 'bad_r50 fails: ValueError: bad' in short
    assert 'fcos_r50' not in short


def test_the_page_is_drawn_again_from_the_committed_results(tmp_path: Path) -> None:
    write_page(tmp_path, {GOOD['config']: GOOD})
    first = (tmp_path / 'zoo.md').read_text()
    write_page(tmp_path, None)
    assert (tmp_path / 'zoo.md').read_text() == first
    # A part of the zoo joins what is there.
    write_page(tmp_path, {FAILED['config']: FAILED})
    assert 'fcos_r50' in (tmp_path / 'zoo.md').read_text()


def test_versions_of_packages_that_are_gone_stay_on_the_page(tmp_path: Path) -> None:
    write_page(tmp_path, {GOOD['config']: GOOD})
    path = tmp_path / 'zoo.json'
    content = json.loads(path.read_text())
    content['versions']['mmgone'] = '1.2.0'
    path.write_text(json.dumps(content))
    write_page(tmp_path, {FAILED['config']: FAILED})
    page = (tmp_path / 'zoo.md').read_text()
    assert f'mmdet {mmdet.__version__}' in page
    assert 'mmgone 1.2.0' in page


def test_without_results_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='run the zoo first'):
        write_page(tmp_path, None)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'steps_without_gradient': ['neck.a.slope_step']}, 'neck.a.slope_step'),
        ({'shared_kept': False}, 'shared'),
        ({'finite': False}, 'not finite'),
        ({'baked': "3.1e-02 at 'neck'"}, 'baked'),
        ({'baked': '5 outputs against 6'}, 'baked'),
        ({'packed': 'differs'}, 'packed'),
    ],
)
def test_what_is_wrong_is_complained_about(change: dict[str, Any], said: str) -> None:
    assert complaints(GOOD) == []
    assert complaints({**GOOD, 'baked': "2.0e-06 at 'neck'"}) == []
    (complaint,) = complaints({**GOOD, **change})
    assert said in complaint


@pytest.mark.parametrize(
    ('reason', 'name'),
    [
        ('ImportError: Failed to import custom modules from mmpretrain.models', 'needs mmpretrain'),
        ('RuntimeError: lap is not installed, please install it', 'needs another package'),
        (
            'RuntimeError: [enforce fail at alloc_cpu.cpp:121]',
            'needs more memory than a trial gets',
        ),
        ('ImportError: please install it by: pip install transformers', 'needs transformers'),
        ('ImportError: Please install Detectron2 first', 'needs detectron2'),
        ('ImportError: Please run "pip install sklearn" to install it', 'needs scikit-learn'),
        ('TypeError: missing an argument', 'stock fails'),
    ],
)
def test_causes_have_short_names(reason: str, name: str) -> None:
    assert cause(reason) == name
