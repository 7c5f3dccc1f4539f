"""Which weights trials began from: their digest, in rows and beneath tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mmengine.config import Config
from synthetic import synthetic_results

from slope_mm.errors import SlopeError
from slope_mm.studies.digests import weights_digest
from slope_mm.studies.measure import keep_weights, start_digest
from slope_mm.studies.processes import Launcher
from slope_mm.studies.results import RESULTS, Results, copy_of, read_results
from slope_mm.studies.runner import Runner
from slope_mm.studies.study import Start, Study
from slope_mm.studies.study_file import parse_study, read_study
from slope_mm.studies.tables import markdown
from slope_mm.studies.trials import (
    Site,
    Trial,
    fill_in_start,
    hook_files,
    plan_trials,
    start_trial,
)

ROOT = Path(__file__).parents[2]
DIFFER = 'The weights of the starts differ'


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='module')
def study() -> Study:
    return read_study(ROOT / 'configs/studies/1_regularizers.py')


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save({'state_dict': tensors}, path)
    return path


def test_a_digest_names_the_weights_and_nothing_else(dense_run: tiny.Run, tmp_path: Path) -> None:
    digest = weights_digest(dense_run.checkpoint)
    assert len(digest) == 12 and int(digest, 16) >= 0
    # Without the optimizer's state, as a study keeps a start.
    kept = tmp_path / 'start' / 'model.pth'
    kept.parent.mkdir()
    keep_weights(Path(dense_run.checkpoint), kept)
    assert weights_digest(kept) == digest
    loaded = torch.load(kept, weights_only=False)
    state = dict(reversed(loaded['state_dict'].items()))
    torch.save(state, tmp_path / 'plain.pth')
    assert weights_digest(tmp_path / 'plain.pth') == digest
    name = next(iter(state))
    state[name] = state[name].clone()
    state[name].view(-1)[0] = torch.nextafter(state[name].view(-1)[0], torch.tensor(torch.inf))
    torch.save(state, tmp_path / 'plain.pth')
    assert weights_digest(tmp_path / 'plain.pth') != digest


def test_a_digest_sees_names_dtypes_and_shapes(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 4)
    states = (
        {'a': zeros},
        {'b': zeros},
        {'a': zeros.T},
        {'a': zeros.to(torch.int32)},
        {'a': zeros.to(torch.bfloat16)},
        {'a': zeros, 'steps': torch.tensor(3)},
        {'a': zeros, 'steps': torch.tensor(4)},
        {'a': zeros, 'none': torch.zeros(0)},
    )
    digests = [weights_digest(saved(tmp_path / 'm.pth', **state)) for state in states]
    assert len(set(digests)) == len(states)
    # A view of the same numbers is the same weights.
    ramp = torch.arange(8.0).view(2, 4)
    digests = [weights_digest(saved(tmp_path / 'm.pth', a=a)) for a in (ramp.T, ramp.T.clone())]
    assert len(set(digests)) == 1


def test_a_digest_of_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match='nothing'):
        weights_digest(tmp_path / 'nothing.pth')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    with pytest.raises(SlopeError):
        weights_digest(tmp_path / 'text.pth')


def checkpoint_study(
    tiny_config: Callable[..., Config], folder: Path, checkpoint: str | None, **arm: Any
) -> Study:
    """A study of fp32 on the tiny shapes, from a checkpoint or from scratch."""
    config = tiny_config(folder, 'mask_rcnn_r18_shapes_fp32')
    task = {
        'config': str(tiny.dump(config, folder / 'fp32.py')),
        'metrics': {'box_mAP': 'coco/bbox_mAP', 'mask_mAP': 'coco/segm_mAP'},
    }
    if checkpoint is not None:
        task['start'] = {'checkpoint': checkpoint}
    text = {
        'tasks': {'shapes': task},
        'seeds': [0, 1],
        'arms': [{'name': 'fp32', **arm}],
        'tables': [{'arms': ['*'], 'against': 'fp32'}],
    }
    return parse_study(text, 'study')


def taught_by(checkpoint: str, **more: Any) -> dict[str, Any]:
    """An arm with a teacher."""
    teacher = {'type': 'slope_mm.SlopeDistillationHook', 'checkpoint': checkpoint, **more}
    teacher['config'] = 'configs/mask_rcnn_r18_shapes_fp32.py'
    recipe = {'weight': {'sparsity': '2:4', 'bits': 4}}
    return {'recipe': recipe, 'options': {'slope_hooks': [teacher]}}


def teachers_of(trial: Trial) -> list[str]:
    return [hook['checkpoint'] for hook in trial.config.custom_hooks if 'checkpoint' in hook]


def test_a_trial_knows_what_it_starts_from(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    found = []
    for checkpoint in (str(dense_run.checkpoint), 'https://nowhere.example/a.pth', None):
        study = checkpoint_study(tiny_config, tmp_path, checkpoint)
        trials, skipped = plan_trials(study, Site(tmp_path))
        assert not skipped
        found.append({start_digest(trial) for trial in trials})
    assert found == [{weights_digest(dense_run.checkpoint)}, {None}, {None}]


def test_a_start_that_was_replaced_is_another_trial(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    start = tmp_path / 'start.pth'
    study = checkpoint_study(tiny_config, tmp_path, str(start))
    state = torch.load(dense_run.checkpoint, weights_only=False)['state_dict']
    keys = []
    for factor in (1.0, 1.0, 0.5):
        torch.save({key: value * factor for key, value in state.items()}, start)
        trials, _ = plan_trials(study, Site(tmp_path))
        keys.append({trial.key for trial in trials})
    assert keys[0] == keys[1] and not keys[0] & keys[2]


def test_a_start_that_is_trained_from_another_checkpoint_is_another_trial(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    study = checkpoint_study(tiny_config, tmp_path, None)
    keys = []
    for load_from in (None, 'https://nowhere.example/a.pth', 'https://nowhere.example/b.pth'):
        start = Start('configs/mask_rcnn_r18_shapes_scratch.py', options={'load_from': load_from})
        trial = start_trial(replace(study.tasks[0], start=start), 0, Site(tmp_path))
        assert trial is not None
        keys.append(trial.key)
    assert len(set(keys)) == 3
    # What trains from scratch is what it was before that counted.
    plain = Start('configs/mask_rcnn_r18_shapes_scratch.py')
    trial = start_trial(replace(study.tasks[0], start=plain), 0, Site(tmp_path))
    assert trial is not None and trial.key == keys[0]


def test_a_teacher_may_be_the_start(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    start = str(dense_run.checkpoint)
    study = checkpoint_study(tiny_config, tmp_path, start, **taught_by('{start}'))
    trials, _ = plan_trials(study, Site(tmp_path))
    assert [teachers_of(trial) for trial in trials] == [[start]] * 2
    study = checkpoint_study(tiny_config, tmp_path, None, **taught_by('{start}'))
    with pytest.raises(SlopeError, match='has no start'):
        plan_trials(study, Site(tmp_path))


def test_a_start_is_filled_in_and_teachers_are_found_at_any_depth(
    dense_run: tiny.Run, tmp_path: Path
) -> None:
    hook = dict(type='Own', teachers=[dict(checkpoint='{start}'), dict(checkpoint='a' * 300)])
    config = Config(dict(load_from=str(dense_run.checkpoint), custom_hooks=[hook]))
    assert hook_files(config) == {'files': ['a' * 300]}
    fill_in_start(config, 'here')
    first, second = config.custom_hooks[0]['teachers']
    assert first['checkpoint'] == str(dense_run.checkpoint) and second['checkpoint'] == 'a' * 300


def test_a_start_that_the_study_trains_is_the_teacher_of_its_trials(tmp_path: Path) -> None:
    study = read_study(ROOT / 'configs/studies/8_distillation.py')
    trials, skipped = plan_trials(study, Site(tmp_path))
    assert not skipped
    taught = [trial for trial in trials if teachers_of(trial)]
    assert {trial.arm_name for trial in taught} >= {'naive + distillation', 'SLOPE + logits'}
    for trial in taught:
        assert trial.start is not None
        assert teachers_of(trial) == [str(trial.start.weights)] == [trial.config.load_from]


def test_a_teacher_that_was_replaced_is_another_trial(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    teacher = tmp_path / 'teacher.pth'
    study = checkpoint_study(
        tiny_config, tmp_path, str(dense_run.checkpoint), **taught_by(str(teacher))
    )
    keys = []
    for value in (1.0, 1.0, 0.5):
        saved(teacher, weight=torch.full((2,), value))
        trials, _ = plan_trials(study, Site(tmp_path))
        keys.append({trial.key for trial in trials})
    assert keys[0] == keys[1] and not keys[0] & keys[2]


def test_rows_that_this_run_cannot_make_are_not_lost(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    study = checkpoint_study(tiny_config, tmp_path, str(dense_run.checkpoint))
    trials, _ = plan_trials(study, Site(tmp_path))
    results = synthetic_results(study)
    for row, trial in zip(results.rows, trials, strict=True):
        row.update(config_hash=trial.key, bytes_from='file')
    # A task whose data this machine has not, and a row of other settings.
    away = {**results.rows[0], 'task': 'nuclei', 'config_hash': 'of another machine'}
    other = {**results.rows[0], 'seed': 9, 'config_hash': 'of other settings'}
    results.rows += [away, other]
    results.starts = [{**away, 'arm': 'start'}]
    results.skipped = [{'task': 'nuclei', 'reason': 'no data'}]
    results.write(tmp_path)
    whole = (tmp_path / RESULTS).read_text()
    Runner(Launcher()).run_all(
        trials, results, lambda found: found.write(tmp_path), lambda: copy_of(tmp_path / RESULTS)
    )
    found = read_results(tmp_path, study)
    assert away in found.rows and other not in found.rows and len(found.rows) == 3
    assert [row['task'] for row in found.starts] == ['nuclei']
    assert (tmp_path / f'{RESULTS}.bak').read_text() == whole
    assert copy_of(tmp_path / RESULTS).name == f'{RESULTS}.bak2'


def test_rows_from_before_the_digest_are_read_reported_and_taken_over(
    dense_run: tiny.Run, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    study = checkpoint_study(tiny_config, tmp_path, str(dense_run.checkpoint))
    trials, _ = plan_trials(study, Site(tmp_path))
    old = synthetic_results(study)
    for row, trial in zip(old.rows, trials, strict=True):
        row.update(config_hash=trial.key, bytes_from='file')
        assert 'start_digest' not in row
    old.write(tmp_path)
    results = read_results(tmp_path, study)
    written: list[Results] = []
    before = [dict(row) for row in results.rows]
    # Nothing is left to run: no process starts, and no folder is made.
    Runner(Launcher()).run_all(trials, results, written.append, no_copy)
    assert results.rows == before and written and not results.failed
    assert not any(trial.folder.exists() for trial in trials)
    text = markdown(study, results)
    assert '| fp32 | 2 |' in text and DIFFER not in text


def no_copy() -> Path:
    raise AssertionError('no row is lost')


def with_digests(study: Study, digest: Callable[[str, int], str | None]) -> Results:
    results = synthetic_results(study)
    results.rows = [row for row in results.rows if row['task'] == 'shapes']
    for row in results.rows:
        row['start_digest'] = digest(row['arm'], row['seed'])
    return results


def test_a_table_of_one_start_says_nothing(study: Study) -> None:
    text = markdown(study, with_digests(study, lambda arm, seed: 'aaa'))
    assert DIFFER not in text
    # Rows that do not say what they began from are no other start.
    text = markdown(study, with_digests(study, lambda arm, seed: 'aaa' if seed else None))
    assert DIFFER not in text


def test_a_table_of_two_starts_says_so_in_one_line(study: Study) -> None:
    results = with_digests(
        study, lambda arm, seed: 'bbb' if (arm, seed) == ('L2 2:4 W2', 3) else 'aaa'
    )
    lines = [line for line in markdown(study, results).splitlines() if DIFFER in line]
    # The table of 2:4 with 2 bits, and the comparison of all regularizers.
    assert len(lines) == 2
    everywhere = '(0, 1, 2, 3, 4)'
    assert lines[0] == (
        f'{DIFFER}, by arm and (seeds): aaa under naive 2:4 W2 {everywhere},'
        f' L2 2:4 W2 (0, 1, 2, 4), SLOPE 2:4 W2 {everywhere}; bbb under L2 2:4 W2 (3).'
    )
    assert 'bbb under L2 2:4 W2 (3)' in lines[1]


def test_starts_of_each_seed_may_differ_from_seed_to_seed_alone(study: Study) -> None:
    (shapes, *others) = study.tasks
    each = replace(shapes, start=Start('start.py', per_seed=True))
    study = replace(study, tasks=(each, *others))
    results = with_digests(study, lambda arm, seed: f'seed{seed}')
    assert DIFFER not in markdown(study, results)
    for row in results.rows:
        if (row['arm'], row['seed']) == ('SLOPE 2:4 W2', 2):
            row['start_digest'] = 'other'
    line = next(line for line in markdown(study, results).splitlines() if DIFFER in line)
    assert 'seed2 under naive 2:4 W2 (2), L2 2:4 W2 (2); other under SLOPE 2:4 W2 (2).' in line
    assert 'seed0' not in line
