"""``tools/zoo.py`` on a catalogue of two configs."""

from __future__ import annotations

import json
from pathlib import Path

import mmdet
import pytest
import tiny

ENTRIES = [
    dict(config='lost/lost.py', folder='lost', problem='FileNotFoundError: no base'),
    dict(config='twin/twin.py', folder='twin', detector='ATSS', same_as='atss/atss.py'),
]
# Where mmpretrain or mmseg is installed, the tool adds some of their models.
ONLY = ('--only', 'lost', 'twin')


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    content = {'mmdet': mmdet.__version__, 'entries': ENTRIES}
    (tmp_path / 'catalogue.json').write_text(json.dumps(content))
    return tmp_path


def test_the_tool_writes_results_and_page(
    work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work_dir / 'docs'
    assert tiny.call_tool('zoo', *ONLY, '--work-dir', work_dir, '--out', out) == 0
    assert '2 configs that stand for the zoo were tried' in capsys.readouterr().out
    assert 'no base' in (out / 'zoo.md').read_text()
    assert {row['config'] for row in json.loads((out / 'zoo.json').read_text())['results']} == {
        'lost/lost.py',
        'twin/twin.py',
    }
    page = (out / 'zoo.md').read_text()
    (out / 'zoo.md').unlink()
    assert tiny.call_tool('zoo', '--report-only', '--out', out, '--work-dir', work_dir) == 0
    assert (out / 'zoo.md').read_text() == page


def test_the_tool_lists_a_part(work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call_tool('zoo', '--list', *ONLY, '--part', '2/2', '--work-dir', work_dir) == 0
    listed = capsys.readouterr().out
    assert 'twin/twin.py' in listed
    assert 'lost/lost.py' not in listed


@pytest.mark.parametrize('wrong', [('--part', '3/2'), ('--only', 'nothing_like_it')])
def test_a_users_mistake_is_one_sentence(
    work_dir: Path, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = work_dir / 'docs'
    assert tiny.call_tool('zoo', *wrong, '--work-dir', work_dir, '--out', out) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ')
    assert len(said.splitlines()) == 1
    assert not out.exists()
