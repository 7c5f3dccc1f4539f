"""Running a zoo: limits, what a failed process is called, resuming, splitting."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS

from slope_mm.errors import ConfigError
from slope_mm.zoo.catalogue import Entry
from slope_mm.zoo.runner import (
    Options,
    parse_part,
    read_results,
    run_entry,
    run_zoo,
    select,
    widest_first,
)


@MODELS.register_module(force=True)
class Misbehaving(BaseModel):
    """A model that does one bad thing when it is built."""

    def __init__(self, does: str) -> None:
        super().__init__()
        if does == 'eats':
            self.kept = torch.ones(2**30, dtype=torch.float64)
        elif does == 'dies':
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == 'sleeps':
            time.sleep(600)
        raise RuntimeError(f'it {does}')

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Never comes to this."""


def misbehave(tmp_path: Path, does: str, **limits: float) -> dict[str, Any]:
    config = tmp_path / f'{does}.py'
    config.write_text(
        f"default_scope = 'mmdet'\nmodel = dict(type='mmengine.Misbehaving', does='{does}')\n"
    )
    options = Options(tmp_path / 'results.jsonl', tmp_path / 'log.txt', **limits)
    return run_entry(Entry(str(config), 'bad', 'Misbehaving'), options, pack=False)


def test_a_model_that_wants_too_much_memory_is_refused_it(tmp_path: Path) -> None:
    result = misbehave(tmp_path, 'eats', memory_gb=4.0)
    assert result['status'] == 'dense fails'
    assert 'memory' in result['reason']
    assert result['peak_mb'] < 4096
    assert result['limited'] == {'memory_gb': 4.0}


def test_a_process_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    result = misbehave(tmp_path, 'dies')
    assert (result['status'], result['reason']) == ('dense fails', 'killed by SIGKILL')


def test_a_model_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    result = misbehave(tmp_path, 'sleeps', seconds=2)
    assert (result['status'], result['reason']) == ('dense fails', 'stopped after 2 s')
    assert result['limited'] == {'seconds': 2}


def test_what_a_limit_stopped_is_tried_again_under_a_larger_one(tmp_path: Path) -> None:
    row = dict(config='a.py', status='dense fails', limited={'seconds': 2})
    (tmp_path / 'results.jsonl').write_text(json.dumps(row) + '\n')
    catalogue = dict(mmdet=mmdet.__version__, entries=[vars(Entry('a.py', 'a', 'A', problem='x'))])
    (tmp_path / 'catalogue.json').write_text(json.dumps(catalogue))
    for seconds, status in ((1.0, 'dense fails'), (900.0, 'unread')):
        options = Options(
            tmp_path / 'results.jsonl', tmp_path / 'log.txt', only=('a.py',), seconds=seconds
        )
        assert run_zoo(options, say=lambda _: None)['a.py']['status'] == status


def test_a_dense_failure_is_told_in_the_stock_models_words(tmp_path: Path) -> None:
    result = misbehave(tmp_path, 'fails')
    assert result['status'] == 'dense fails'
    assert 'it fails' in result['reason']
    assert 'it fails' in (tmp_path / 'log.txt').read_text()


ENTRIES = [
    Entry('a/one.py', 'a', 'ATSS', 'ResNet'),
    Entry('a/two.py', 'a', 'ATSS', 'ResNeXt'),
    Entry('b/one.py', 'b', 'ATSS', 'ResNet'),
    Entry('b/two.py', 'b', 'FCOS', 'ResNet'),
    Entry('c/three.py', 'c', 'FCOS', 'ResNet', same_as='b/two.py'),
]


def options(tmp_path: Path, **kwargs: Any) -> Options:
    return Options(tmp_path / 'results.jsonl', tmp_path / 'log.txt', **kwargs)


def test_parts_make_up_the_whole(tmp_path: Path) -> None:
    parts = [select(ENTRIES, options(tmp_path, part=(i, 3))) for i in (1, 2, 3)]
    assert sorted(e.config for part in parts for e in part) == sorted(e.config for e in ENTRIES)
    assert parse_part('2/3') == (2, 3)


@pytest.mark.parametrize('text', ['', '3', '0/2', '3/2', 'a/b', '1/0'])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match='--part'):
        parse_part(text)


def test_patterns_choose_configs_and_an_idle_one_is_refused(tmp_path: Path) -> None:
    found = select(ENTRIES, options(tmp_path, only=('b/', 'three')))
    assert [e.config for e in found] == ['b/one.py', 'b/two.py', 'c/three.py']
    with pytest.raises(ConfigError, match='yolo'):
        select(ENTRIES, options(tmp_path, only=('yolo',)))


def test_new_classes_come_before_more_of_the_same() -> None:
    order = [entry.config for entry in widest_first(ENTRIES)]
    assert order == ['a/one.py', 'b/two.py', 'a/two.py', 'b/one.py', 'c/three.py']


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    import mmdet

    made = options(tmp_path, only=('three', 'broken'))
    entries = [*ENTRIES, Entry('d/broken.py', 'd', problem='FileNotFoundError: gone')]
    kept = {'mmdet': mmdet.__version__, 'entries': [vars(entry) for entry in entries]}
    (tmp_path / 'catalogue.json').write_text(json.dumps(kept))
    # A line whose writer was killed.
    (tmp_path / 'results.jsonl').write_text(
        '{"config": "c/three.py", "status": "kept"}\n{"config": "d/bro'
    )
    said: list[str] = []
    results = run_zoo(made, said.append)
    assert results['c/three.py']['status'] == 'kept'
    assert results['d/broken.py']['status'] == 'unread'
    assert len(said) == 1
    assert read_results(tmp_path / 'results.jsonl') == results
    run_zoo(made, said.append)
    assert len(said) == 1
