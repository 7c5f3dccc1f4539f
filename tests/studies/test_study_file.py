"""Study files: the shipped ones are complete, bad ones end in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slope_mm.errors import SlopeError
from slope_mm.studies.arm_configs import arm_config
from slope_mm.studies.study import Comparison, Study, Table
from slope_mm.studies.study_file import parse_study, read_study
from slope_mm.studies.trials import Site, hash_of, plan_trials

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / 'configs' / 'studies').glob('*.py'))
FP32 = 'configs/mask_rcnn_r18_shapes_fp32.py'
W4 = {'weight': {'sparsity': '2:4', 'bits': 4}}
STUDY: dict[str, Any] = {
    'tasks': {'shapes': {'config': FP32, 'metrics': {'box_mAP': 'coco/bbox_mAP'}}},
    'seeds': [0, 1],
    'arms': [
        {'name': 'fp32'},
        {'name': 'naive', 'recipe': W4},
        {'name': 'slope', 'recipe': W4, 'regularizer': {'type': 'cosine', 'weight': 1.0}},
    ],
    'tables': [{'arms': ['*'], 'against': 'naive', 'reference': 'fp32'}],
    'figures': [{'kind': 'bits', 'name': 'bits', 'series': {'naive': ['naive']}}],
    'quick': {'seeds': [5], 'arms': ['fp32', 'slope']},
}


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_shows_all_of_its_arms(path: Path) -> None:
    study = read_study(path)
    shown = set()
    for table in study.tables:
        pairs = table.pairs if isinstance(table, Comparison) else ()
        shown.update(name for pair in pairs for name in pair)
        if isinstance(table, Table):
            shown.update({*table.arms, table.against, table.reference})
    assert shown - {None} == {arm.name for arm in study.arms}
    assert study.figures


def test_all_studies_of_the_programme_are_there() -> None:
    numbers = sorted(int(path.stem.split('_')[0]) for path in SHIPPED)
    assert numbers == list(range(1, 17))


def test_the_key_arms_have_five_seeds_on_shapes_and_three_on_nuclei() -> None:
    study = read_study(ROOT / 'configs/studies/1_regularizers.py')
    counts = {
        task.name: {len(study.seeds(task, arm)) for arm in study.arms} for task in study.tasks
    }
    assert counts == {
        'shapes': {5},
        'shapes_trained': {3},
        'shapes_trained_long': {5},
        'nuclei': {3},
        'nuclei_long': {3},
        'shapes_brief': {5},
    }


def test_lambda_is_swept_over_five_decades() -> None:
    study = read_study(ROOT / 'configs/studies/2_lambda.py')
    for optimizer in ('AdamW', 'SGD'):
        swept = [
            arm.regularizer['weight']
            for arm in study.arms
            if arm.name.startswith(f'2:4 W2 {optimizer} cosine') and not arm.schedule
        ]
        assert max(swept) / min(swept) == 1e5


def test_the_short_form_keeps_what_belongs_to_its_arms() -> None:
    study = parse_study(STUDY, 'study', quick=True)
    assert study.name == 'study_quick'
    assert [arm.name for arm in study.arms] == ['fp32', 'slope']
    assert [task.seeds for task in study.tasks] == [(5,)]
    # Nothing to compare with, nothing to draw.
    assert study.tables == ()
    assert study.figures[0].series == {}


def test_the_short_form_of_study_one_changes_schedule_and_start_alone() -> None:
    path = ROOT / 'configs/studies/1_regularizers.py'
    full, short = read_study(path), read_study(path, quick=True)
    (task,) = short.tasks
    assert task.options['train_cfg.max_epochs'] < full.tasks[0].options['train_cfg.max_epochs']
    assert task.start is not None and task.start.config == full.tasks[0].start.config
    assert {arm.name for arm in short.arms} < {arm.name for arm in full.arms}


def test_the_coco_study_is_complete_and_says_that_it_was_not_run() -> None:
    study = read_study(ROOT / 'configs/studies/9_coco.py')
    assert study.not_run is not None and study.not_run.startswith('Not run')
    (task,) = study.tasks
    configs = {arm.name: arm_config(task, arm, 0) for arm in study.arms}
    assert len({str(config.train_dataloader) for config in configs.values()}) == 1
    # Its start is the published checkpoint of the base config.
    starts = {config.load_from for config in configs.values()}
    assert len(starts) == 1 and 'poly_3x_coco' in starts.pop()
    for name, config in configs.items():
        wrapper = config.optim_wrapper
        assert ('regularizer' in wrapper) == (name != 'fp32')
        assert config.model.backbone.depth == 50


def setting(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A mistake: a value at a place of the study."""

    def make(study: dict[str, Any]) -> None:
        inner: Any = study
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return make


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    'unknown key': (setting('armz', value=[]), "unknown key 'armz'.*nearest: 'arms'"),
    'unknown arm key': (
        setting('arms', 1, 'recipie', value=W4),
        "arm 1 has the unknown key 'recipie'; nearest: 'recipe'",
    ),
    'unknown task key': (setting('tasks', 'shapes', 'sede', value=[1]), "task 'shapes'.*'sede'"),
    'no arms': (setting('arms', value=[]), 'no arms'),
    'twice': (setting('arms', 2, 'name', value='naive'), "'naive' is there more than once"),
    'bad recipe': (
        setting('arms', 1, 'recipe', value={'weight': {'sparsity': '4:2', 'bits': 4}}),
        "arm 'naive': .*2:4",
    ),
    'bad regularizer': (
        setting('arms', 2, 'regularizer', 'type', value='cosin'),
        "arm 'slope': .*nearest: 'cosine'",
    ),
    'bad schedule key': (
        setting('arms', 2, 'schedule', value={'warm_up': 0.1}),
        "arm 'slope': schedule.*'warm_up'; nearest: 'warmup'",
    ),
    'bad schedule': (setting('arms', 2, 'schedule', value={'warmup': -1}), "'slope'.*warmup=-1"),
    'regularized fp32': (
        setting('arms', 0, 'regularizer', value={'type': 'l2'}),
        "arm 'fp32': .*needs a recipe",
    ),
    'bad seeds': (setting('seeds', value=[0, 0]), 'a seed counts once'),
    'seed of text': (setting('seeds', value=['a']), 'integers'),
    'no config': (
        setting('tasks', 'shapes', 'config', value='configs/mask_rcnn_r18_shapes_fp23.py'),
        'there is no config.*nearest:.*shapes_fp32',
    ),
    'bad start': (setting('tasks', 'shapes', 'start', value={}), "either 'config' or 'checkpoint'"),
    'bad table': (
        setting('tables', 0, 'against', value='naiv'),
        "table 0: against 'naiv' is unknown.*nearest: 'naive'",
    ),
    'bad pair': (setting('tables', 0, value={'pairs': [['naive']]}), 'is no pair'),
    'bad figure': (setting('figures', 0, 'kind', value='pie'), "figure 0: kind 'pie'"),
    'bad series': (
        setting('figures', 0, 'series', 'x', value=['nobody*']),
        "'nobody\\*' is no arm",
    ),
    'bad interplay': (
        setting('interplay', value={'sparsity': ['4:2'], 'bits': [4]}),
        "interplay: .*'4:2'",
    ),
    'bits of an interplay': (
        setting('interplay', value={'sparsity': ['2:4'], 'bits': [1]}),
        'interplay: .*1',
    ),
    'bad threshold': (
        setting('thresholds', value=[{'dense': 'fp32', 'sparse': 'naive'}]),
        'threshold 0: quantized',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_ends_in_one_sentence(mistake: str) -> None:
    change, message = MISTAKES[mistake]
    study = copy.deepcopy(STUDY)
    change(study)
    with pytest.raises(SlopeError, match=message) as error:
        parse_study(study, 'study')
    assert '\n' not in str(error.value)


def test_a_file_that_cannot_be_run_names_itself(tmp_path: Path) -> None:
    path = tmp_path / 'study.py'
    path.write_text('arms = [undefined]\n')
    with pytest.raises(SlopeError, match=r"study file '.*study.py' cannot be read: NameError"):
        read_study(path)
    with pytest.raises(SlopeError, match='there is no study file'):
        read_study(tmp_path / 'other.py')


# --- trials --------------------------------------------------------------------------------------


def parsed(**changes: Any) -> Study:
    return parse_study({**copy.deepcopy(STUDY), **changes}, 'study')


def planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, study: Study, ranks: int = 1, threads: int = 1
) -> dict[Any, Any]:
    # Where the shapes set lies is another test's concern.
    monkeypatch.setattr('slope_mm.studies.trials.missing_data', lambda task: None)
    trials, skipped = plan_trials(study, Site(tmp_path, ranks, threads))
    assert not skipped
    return {(trial.arm.name, trial.seed): trial for trial in trials}


def test_arms_share_everything_but_their_treatment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trials = planned(monkeypatch, tmp_path, parsed())
    assert list(trials) == [(a, s) for s in (0, 1) for a in ('fp32', 'naive', 'slope')]
    for seed in (0, 1):
        configs = [trials[arm, seed].config for arm in ('fp32', 'naive', 'slope')]
        for key in ('train_dataloader', 'train_cfg', 'param_scheduler', 'randomness', 'load_from'):
            assert len({str(config[key]) for config in configs}) == 1, key
        assert configs[0].randomness.seed == seed
        assert len({str(config.optim_wrapper.optimizer) for config in configs}) == 1
        # Every one of them draws the same random numbers in an epoch.
        assert all('EpochSeedHook' in str(config.custom_hooks) for config in configs)
    assert len({trial.schedule_key for trial in trials.values()}) == 1
    assert len({trial.key for trial in trials.values()}) == len(trials)
    assert len({trial.folder for trial in trials.values()}) == len(trials)


def test_two_spellings_of_a_treatment_are_one_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spelled = {'weight': {'bits': 4, 'codes': 'lsq', 'step': 'channel', 'sparsity': '2:4'}}
    other = {'name': 'other', 'recipe': {**spelled, 'gradient': 'ste', 'activation': None}}
    trials = planned(monkeypatch, tmp_path, parsed(arms=[*STUDY['arms'], other]))
    assert trials['other', 0].key == trials['naive', 0].key != trials['slope', 0].key
    folder = trials['naive', 0].folder
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{"task": "shapes", "arm": "naive", "box_mAP": 0.5}')
    row = trials['other', 0].result()
    assert row is not None and (row['arm'], row['box_mAP']) == ('other', 0.5)


def test_an_arm_of_another_schedule_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = parsed()
    slower = {**STUDY['arms'][1], 'name': 'slower', 'options': {'optim_wrapper.optimizer.lr': 1e-5}}
    trials = planned(monkeypatch, tmp_path, parsed(arms=[*STUDY['arms'], slower]))
    assert trials['slower', 0].config.optim_wrapper.optimizer.lr == 1e-5
    assert trials['slower', 0].schedule_key != trials['naive', 0].schedule_key
    assert arm_config(study.tasks[0], study.arms[1], 0).optim_wrapper.optimizer.lr != 1e-5


def test_a_key_follows_start_data_and_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = set()
    tasks = STUDY['tasks']['shapes']
    scratch = {'config': 'configs/mask_rcnn_r18_shapes_scratch.py'}
    for task in (
        tasks,
        {**tasks, 'shapes': {'root': 'data/shapes', 'num_train': 10}},
        {**tasks, 'start': scratch},
        {**tasks, 'start': {**scratch, 'options': {'train_cfg.max_epochs': 2}}},
        {**tasks, 'start': {'checkpoint': 'a.pth'}},
        {**tasks, 'options': {'train_cfg.max_epochs': 2}},
    ):
        trials = planned(monkeypatch, tmp_path, parsed(tasks={'shapes': task}))
        keys.add(trials['naive', 0].key)
    for site in ({'ranks': 2}, {'threads': 2}):
        keys.add(planned(monkeypatch, tmp_path, parsed(), **site)['naive', 0].key)
    assert len(keys) == 8


def test_one_start_serves_all_seeds_unless_each_seed_asks_for_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = {'config': 'configs/mask_rcnn_r18_shapes_scratch.py'}
    for per_seed, count in ((False, 1), (True, 2)):
        task = {**STUDY['tasks']['shapes'], 'start': {**start, 'per_seed': per_seed}}
        trials = planned(monkeypatch, tmp_path, parsed(tasks={'shapes': task}))
        starts = {trial.start.key: trial.start for trial in trials.values()}
        assert len(starts) == count
        for trial in trials.values():
            assert trial.config.load_from == str(trial.start.weights)
            assert trial.start.seed == (trial.seed if per_seed else 0)


def test_tasks_that_start_alike_share_one_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = {'config': 'configs/mask_rcnn_r18_shapes_scratch.py'}
    task = {**STUDY['tasks']['shapes'], 'start': start}
    brief = {**task, 'options': {'train_cfg.max_epochs': 1}}
    monkeypatch.setattr('slope_mm.studies.trials.missing_data', lambda task: None)
    trials, _ = plan_trials(parsed(tasks={'shapes': task, 'brief': brief}), Site(tmp_path))
    assert len({trial.folder for trial in trials}) == len(trials)
    assert len({trial.start.folder for trial in trials}) == 1


def test_an_override_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arm = {'name': 'a', 'options': {'optim_wraper.optimizer.lr': 1e-5}}
    with pytest.raises(SlopeError, match="arm 'a'.*'optim_wraper' there; nearest: 'optim_wrapper'"):
        planned(monkeypatch, tmp_path, parsed(arms=[*STUDY['arms'], arm]))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'load_from': 'a.pth'}, "'load_from', but the task names a start"),
        ({'randomness.seed': 7}, 'override the seed'),
        ({'randomness': {'seed': 7}}, 'override the seed'),
    ],
)
def test_overrides_that_a_trial_would_not_take_are_refused(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = {'config': 'configs/mask_rcnn_r18_shapes_scratch.py'}
    task = {**STUDY['tasks']['shapes'], 'start': scratch}
    arm = {'name': 'a', 'options': options}
    with pytest.raises(SlopeError, match=f"arm 'a' on task 'shapes': .*{words}"):
        planned(monkeypatch, tmp_path, parsed(tasks={'shapes': task}, arms=[*STUDY['arms'], arm]))


def test_hooks_that_an_fp32_arm_gets_compressed_ones_get_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ema = {'custom_hooks': [{'type': 'EMAHook'}]}
    task = {**STUDY['tasks']['shapes'], 'options': ema}
    trials = planned(monkeypatch, tmp_path, parsed(tasks={'shapes': task}))
    for name in ('fp32', 'naive'):
        hooks = [hook['type'] for hook in trials[name, 0].config.custom_hooks]
        assert hooks.count('EMAHook') == 1
    # Those of the compressed arms are all there still.
    assert sum('Slope' in hook for hook in hooks) >= 3


def test_a_recipe_that_does_not_fit_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = {**W4, 'rules': [{'match': 'backbon', 'compress': False}]}
    arms = [*STUDY['arms'], {'name': 'bad', 'recipe': recipe}]
    with pytest.raises(SlopeError, match="arm 'bad' on task 'shapes': .*'backbon'"):
        planned(monkeypatch, tmp_path, parsed(arms=arms))


def test_hashes_do_not_depend_on_the_order_of_keys() -> None:
    assert hash_of({'a': 1, 'b': (2, 3)}) == hash_of({'b': (2, 3), 'a': 1})
    assert hash_of({'a': 1}) != hash_of({'a': 2})
