"""The demo's bookkeeping: steps run once, go on when interrupted, start over on changes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from slope_mm.analysis.comparison import ArmResult
from slope_mm.errors import SlopeError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location('tool_demo', ROOT / 'tools' / 'demo.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def append(path: Path, fail: bool = False) -> list[str]:
    """A command that leaves a line in a file, and may fail afterwards."""
    code = f'open({str(path)!r}, "a").write("ran\\n")'
    return ['-c', code + ('; raise SystemExit(3)' if fail else '')]


def arm_of(demo: ModuleType, tmp_path: Path, epochs: int = 2) -> object:
    config = tmp_path / 'config.py'
    config.write_text(f'train_cfg = dict(max_epochs={epochs})\n')
    return demo.Arm('arm', config, tmp_path / 'arm')


def test_a_finished_step_is_not_run_again(demo: ModuleType, tmp_path: Path) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    first = demo.Steps(tmp_path).run('train arm', arm, append(log))
    (tmp_path / 'arm' / 'epoch_2.pth').write_text('trained')
    assert demo.Steps(tmp_path).run('train arm', arm, append(log)) == first
    assert log.read_text() == 'ran\n'


def test_a_training_whose_checkpoint_is_gone_runs_again(demo: ModuleType, tmp_path: Path) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    for _ in range(2):
        demo.Steps(tmp_path).run('train arm', arm, append(log))
    assert log.read_text() == 'ran\nran\n'


@pytest.mark.parametrize(
    ('step', 'left'), [('pack arm', 'model.slope'), ('test arm', 'test/20260101/metrics.json')]
)
def test_a_step_whose_file_is_gone_runs_again(
    step: str, left: str, demo: ModuleType, tmp_path: Path
) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    file = tmp_path / 'arm' / left
    for _ in range(2):
        demo.Steps(tmp_path).run(step, arm, append(log))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('made')
    assert log.read_text() == 'ran\n'
    file.unlink()
    demo.Steps(tmp_path).run(step, arm, append(log))
    assert log.read_text() == 'ran\nran\n'


def test_checkpoints_that_nobody_knows_are_neither_resumed_nor_removed(
    demo: ModuleType, tmp_path: Path
) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    found = tmp_path / 'arm' / 'epoch_1.pth'
    found.parent.mkdir()
    found.write_text('of another config?')
    with pytest.raises(SlopeError, match='does not say what they are'):
        demo.Steps(tmp_path).run('train arm', arm, append(log))
    assert found.exists() and not log.exists()


def test_a_damaged_record_is_told(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / 'steps.json').write_text('{"train arm": {"key"')
    with pytest.raises(SlopeError, match='is damaged'):
        demo.Steps(tmp_path)


def test_the_work_dir_is_where_the_user_stands(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.named_from_here(Path('mine')) == tmp_path / 'mine'
    monkeypatch.chdir(ROOT)
    assert demo.named_from_here(Path('work_dirs/demo')) == Path('work_dirs/demo')


def test_an_interrupted_step_keeps_its_checkpoints_and_runs_again(
    demo: ModuleType, tmp_path: Path
) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    with pytest.raises(SlopeError, match='exit code 3'):
        demo.Steps(tmp_path).run('train arm', arm, append(log, fail=True))
    # The same step once more: here its failure is what stands for the interruption.
    (tmp_path / 'arm' / 'epoch_1.pth').write_text('half way')
    with pytest.raises(SlopeError):
        demo.Steps(tmp_path).run('train arm', arm, append(log, fail=True))
    assert (tmp_path / 'arm' / 'epoch_1.pth').exists()
    assert log.read_text() == 'ran\nran\n'


def test_a_changed_config_starts_over(demo: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    first = demo.Steps(tmp_path).run('train arm', arm_of(demo, tmp_path), append(log))
    (tmp_path / 'arm' / 'epoch_2.pth').write_text('of the old config')
    changed = arm_of(demo, tmp_path, epochs=3)
    assert demo.Steps(tmp_path).run('train arm', changed, append(log)) != first
    assert not (tmp_path / 'arm' / 'epoch_2.pth').exists()
    assert log.read_text() == 'ran\nran\n'


def test_a_step_depends_on_what_came_before(demo: ModuleType, tmp_path: Path) -> None:
    arm, log = arm_of(demo, tmp_path), tmp_path / 'log'
    steps = demo.Steps(tmp_path)
    assert steps.run('test arm', arm, append(log), 'a') != steps.run(
        'test arm', arm, append(log), 'b'
    )
    assert json.loads((tmp_path / 'steps.json').read_text())['test arm']['finished']


def test_the_output_of_a_failed_step_is_kept_and_quoted(demo: ModuleType, tmp_path: Path) -> None:
    arm = arm_of(demo, tmp_path)
    with pytest.raises(SlopeError, match='the reason') as failure:
        demo.Steps(tmp_path).run('train arm', arm, ['-c', 'raise SystemExit("the reason")'])
    log = tmp_path / 'arm' / 'train_arm.log'
    assert str(log) in str(failure.value)
    assert 'the reason' in log.read_text()


@pytest.mark.parametrize(('slope', 'word'), [(0.48, 'reaches'), (0.47, 'MISSES')])
def test_the_verdict_says_when_the_goal_is_missed(
    demo: ModuleType, slope: float, word: str
) -> None:
    results = [
        ArmResult('fp32', 0.5, 0.4, None, None, 10, 1.0),
        ArmResult('naive', 0.45, 0.39, 0.9, 10.0, 1, 10.0),
        ArmResult('slope', slope, 0.4, 0.95, 11.0, 1, 10.0),
    ]
    assert word in demo.verdict(results)[0]


def test_all_arms_start_from_the_dense_model(demo: ModuleType, tmp_path: Path) -> None:
    fp32, *compressed = demo.arms(tmp_path)
    assert [arm.name for arm in compressed] == ['naive', 'slope']
    for arm in compressed:
        assert arm.start == fp32.checkpoint
        assert arm.options == ['--cfg-options', f'load_from={fp32.checkpoint}']
    assert fp32.checkpoint.name == 'epoch_12.pth'
