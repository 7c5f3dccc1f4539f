"""Two processes (gloo) compute what one computes, and stay equal to each other bit for bit."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detector_configs import atss
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import slope_mm
from slope_mm import ConfigError
from slope_mm.engine.launchers import use_launcher

MakeConfig = Callable[..., Config]
WORKER = Path(__file__).with_name('distributed_worker.py')
Seen = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope='module')
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint with calibrated inputs: calibration samples depend on the batches."""
    return tiny.train(tiny.toy_config(tmp_path_factory.mktemp('toy'))).checkpoint


@pytest.fixture(scope='module')
def atss_start(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a detector."""
    return tiny.train(atss(tiny_config(tmp_path_factory.mktemp('atss'), validate=False))).checkpoint


@pytest.fixture(scope='module')
def ranks(
    tiny_config: MakeConfig,
    dense_run: tiny.Run,
    start: Path,
    atss_start: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    """What both processes saw, by config; all configs are trained by one pair of processes."""
    root = tmp_path_factory.mktemp('ranks')
    detector = tiny_config(root / 'd', validate=False, load_from=str(dense_run.checkpoint))
    detector.train_dataloader.batch_size = 2
    frozen = tiny_config(root / 'z', validate=False, load_from=str(dense_run.checkpoint))
    frozen.model.backbone.frozen_stages = 2
    whole = atss(tiny_config(root / 'a', validate=False, load_from=str(atss_start)))
    frozen.train_dataloader.batch_size = whole.train_dataloader.batch_size = 2
    configs = {
        'toy': tiny.toy_config(root / 't', batch_size=2, load_from=str(start)),
        'first_batch': tiny.toy_config(root / 'f', batch_size=2),
        'hook': tiny.toy_config(root / 'h', batch_size=2),
        # Of the images that the second process gets, one of its second iteration is spoilt.
        'skip': tiny.toy_config(root / 's', batch_size=2, load_from=str(start)),
        'unreached': tiny.toy_config(root / 'u', batch_size=2, model__spare=True),
        'ignored': tiny.toy_config(root / 'i', batch_size=2, model__ignored=True),
        'late': tiny.toy_config(root / 'l', batch_size=2, train_cfg__max_iters=5),
        'detector': detector,
        'frozen': frozen,
        'atss': whole,
    }
    configs['ignored'].model.arch = configs['late'].model.arch = 'BranchNet'
    configs['hook'].custom_hooks = [dict(type='slope_mm.SlopeCalibrationHook', batches=1)]
    skip = configs['skip']
    skip.train_dataloader.dataset = dict(type='SpoiltImages', spoilt=(5,))
    skip.train_cfg.max_iters = 4
    skip.optim_wrapper.accumulative_counts = 2
    skip.custom_hooks = [dict(type='slope_mm.SlopeFiniteHook', action='skip')]
    files = []
    for name, config in configs.items():
        config.find_unused_parameters = name in ('unreached', 'ignored')
        config.launcher = 'pytorch'
        files.append(tiny.dump(config, root / f'{name}.py'))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = subprocess.run([*launch, WORKER, root, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {
        name: [torch.load(root / f'{name}_rank{rank}.pt') for rank in range(2)] for name in configs
    }


def test_two_processes_equal_one_with_the_same_global_batch(
    ranks: Seen, start: Path, tmp_path: Path
) -> None:
    one = tiny.train(tiny.toy_config(tmp_path, batch_size=4, load_from=str(start)))
    wanted, before = tiny.state_of(one.model), ranks['toy'][0]['first']
    for rank in ranks['toy']:
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert rank['last'].keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.allclose(rank['last'][key], value, rtol=1e-5, atol=1e-6), key
    moved = max(float((wanted[k] - before[k]).abs().max()) for k in wanted if 'weight' in k)
    assert moved > 1e-2, 'the comparison would hold without training'


def test_a_detector_on_two_processes_equals_one(
    ranks: Seen, tiny_config: MakeConfig, atss_start: Path, tmp_path: Path
) -> None:
    """Mean losses over the global batch, and batch norms in evaluation, so that it can be true."""
    config = atss(tiny_config(tmp_path, validate=False, load_from=str(atss_start)))
    one = tiny.state_of(tiny.train(config).model)
    two, before = ranks['atss'][0]['last'], ranks['atss'][0]['first']
    assert one.keys() == two.keys()
    updates = [key for key in tiny.differing(before, one) if one[key].is_floating_point()]
    assert len([key for key in updates if key.endswith('slope_step')]) > 20
    for key in updates:
        wanted, found = one[key] - before[key], two[key] - before[key]
        assert float((found - wanted).norm()) < 0.01 * float(wanted.norm()) + 1e-6, key


@pytest.mark.parametrize(
    'name',
    [
        *('toy', 'first_batch', 'hook', 'skip', 'unreached', 'ignored', 'late'),
        *('detector', 'frozen', 'atss'),
    ],
)
def test_ranks_stay_equal_while_they_train(ranks: Seen, name: str) -> None:
    first, second = ranks[name]
    moved = tiny.differing(first['first'], first['last'])
    assert [key for key in moved if key.endswith('slope_step')]
    # BN statistics are each rank's own: mmengine broadcasts no buffers.
    own = [k for k in first['last'] if 'running_' in k]
    assert set(tiny.differing(first['last'], second['last'])) <= set(own)
    assert first['masks']
    assert not tiny.differing(first['masks'], second['masks'])


def test_ranks_skip_together(ranks: Seen, start: Path, tmp_path: Path) -> None:
    """One process's NaN drops the accumulated update of both; the next one trains."""
    config = tiny.toy_config(tmp_path, batch_size=4, load_from=str(start))
    config.train_dataloader.dataset = dict(type='SpoiltImages', spoilt=(5,))
    config.train_cfg.max_iters = 4
    config.optim_wrapper.accumulative_counts = 2
    config.custom_hooks = [dict(type='slope_mm.SlopeFiniteHook', action='skip')]
    wanted = tiny.state_of(tiny.train(config).model)
    for rank in ranks['skip']:
        for key, value in wanted.items():
            assert torch.allclose(rank['last'][key], value, rtol=1e-5, atol=1e-6), key


def test_the_hook_leaves_ranks_of_a_detector_with_equal_ranges(ranks: Seen) -> None:
    first, second = (rank['first'] for rank in ranks['detector'])
    assert not tiny.differing(first, second)
    signs = [value for key, value in first.items() if key.endswith('slope_act_signed')]
    assert len(signs) == 38
    assert all(int(sign) >= 0 for sign in signs), 'calibrated before the first iteration'


def first_step(*indices: int) -> float:
    """The step of the toy's first input, calibrated on these images in one process."""
    init_default_scope('mmengine')
    model = MODELS.build(dict(type='slope_mm.SlopeModel', arch='ToyNet', recipe=tiny.TOY_RECIPE))
    images = [tiny.ToyImages()[index] for index in indices]
    slope_mm.calibrate(model.train(), [{key: [i[key] for i in images] for key in images[0]}])
    return float(model.first.slope_act_step)


@pytest.mark.parametrize(
    ('name', 'when', 'own', 'other'),
    # The hook's images are spread over the set; without it, ranks have their own first batch.
    [('hook', 'first', (0, 16), (32, 48)), ('first_batch', 'last', (0, 2), (1, 3))],
)
def test_ranges_come_from_the_images_of_all_ranks(
    ranks: Seen, name: str, when: str, own: tuple[int, ...], other: tuple[int, ...]
) -> None:
    pooled = first_step(*own, *other)
    assert first_step(*own) < 0.7 * pooled, 'the ranks saw the same'
    for rank in ranks[name]:
        # Two small updates may lie between the calibration and the look.
        assert float(rank[when]['first.slope_act_step']) == pytest.approx(pooled, rel=0.05)
        assert int(rank[when]['first.slope_act_signed']) == 1
        assert int(rank[when]['twice.slope_act_signed']) == 0


def test_without_the_hook_nothing_is_calibrated_beforehand(ranks: Seen) -> None:
    for rank in ranks['first_batch']:
        assert int(rank['first']['first.slope_act_signed']) == -1


@pytest.mark.parametrize(('name', 'layer'), [('unreached', 'spare.'), ('ignored', 'branch.')])
def test_an_unreached_layer_stays_as_it_was(ranks: Seen, name: str, layer: str) -> None:
    """``find_unused_parameters``: DDP refuses a gradient from the regularizer alone.

    Neither a layer that never runs nor one whose output the loss does not use may get one.
    """
    for rank in ranks[name]:
        learned = [key for key in rank['last'] if key.startswith(layer) and 'act' not in key]
        assert learned
        assert not set(learned) & set(tiny.differing(rank['first'], rank['last']))


def test_an_input_without_a_range_takes_part_in_the_loss(ranks: Seen) -> None:
    """A head that first sees a region in the third iteration: DDP waits for its step till then."""
    for rank in ranks['late']:
        assert int(rank['first']['branch.slope_act_signed']) == -1
        assert int(rank['last']['branch.slope_act_signed']) == 1
        assert 0 < float(rank['last']['branch.slope_act_step']) < 0.9


def test_frozen_stages_stay_frozen_on_all_ranks(ranks: Seen) -> None:
    """They freeze once more in every ``train()``, when DDP has already counted parameters."""
    for rank in ranks['frozen']:
        moved = tiny.differing(rank['first'], rank['last'])
        frozen = ('backbone.conv1', 'backbone.layer1', 'backbone.layer2')
        weights = [key for key in moved if 'running_' not in key and 'num_batches' not in key]
        assert not [key for key in weights if key.startswith(frozen)]
        assert [key for key in weights if key.startswith('backbone.layer3')]


def test_slurm_and_mpi_start_the_same_processes(ranks: Seen, start: Path, tmp_path: Path) -> None:
    """By the variables that srun and Open MPI's mpirun set; without a GPU mmengine cannot."""
    files = []
    for launcher in ('slurm', 'mpi'):
        config = tiny.toy_config(tmp_path / launcher, batch_size=2, load_from=str(start))
        config.launcher = launcher
        files.append(tiny.dump(config, tmp_path / f'{launcher}.py'))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, tmp_path, *files],
            env={
                **os.environ,
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
                **{f'SLURM_{key}': str(rank) for key in ('PROCID', 'LOCALID')},
                **{'SLURM_NTASKS': '2', 'SLURM_NODELIST': 'localhost'},
                **{f'OMPI_COMM_WORLD_{key}': str(rank) for key in ('RANK', 'LOCAL_RANK')},
                'OMPI_COMM_WORLD_SIZE': '2',
            },
            stdout=(tmp_path / f'output_{rank}').open('w'),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        assert process.wait(600) == 0, (tmp_path / f'output_{rank}').read_text()[-6000:]
    for launcher in ('slurm', 'mpi'):
        assert_trained_as(ranks['toy'], tmp_path, launcher)


def assert_trained_as(by_torchrun: list[dict[str, Any]], root: Path, launcher: str) -> None:
    for rank, expected in enumerate(by_torchrun):
        found = torch.load(root / f'{launcher}_rank{rank}.pt')
        assert not tiny.differing(expected['last'], found['last'])


REAL = {
    'slurm': ['srun', '--ntasks=2', '--kill-on-bad-exit=1'],
    # As root, and with more processes than cores: both are what Open MPI has to be asked for.
    'mpi': ['mpirun', '--allow-run-as-root', '--oversubscribe', '-np', '2'],
}


@pytest.mark.parametrize('launcher', REAL)
def test_srun_and_mpirun_themselves(
    launcher: str, ranks: Seen, start: Path, tmp_path: Path
) -> None:
    command = REAL[launcher]
    if shutil.which(command[0]) is None:
        pytest.skip(f'needs {command[0]}')
    done = subprocess.run([*command, 'true'], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f'{command[0]} starts nothing here: {done.stderr.strip()[-200:]}')
    config = tiny.toy_config(tmp_path / launcher, batch_size=2, load_from=str(start))
    config.launcher = launcher
    file = tiny.dump(config, tmp_path / f'{launcher}.py')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
    done = subprocess.run(
        [*command, sys.executable, WORKER, tmp_path, file],
        env={**os.environ, **address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert_trained_as(ranks['toy'], tmp_path, launcher)


@pytest.mark.parametrize(
    ('launcher', 'parts'),
    [
        ('pytorch', 'RANK is not set.*torchrun'),
        ('slurm', 'SLURM_PROCID is not set.*srun'),
        ('mpi', 'OMPI_COMM_WORLD_RANK is not set.*mpirun'),
    ],
)
def test_a_launcher_that_did_not_launch_this_process(launcher: str, parts: str) -> None:
    with pytest.raises(ConfigError, match=parts):
        use_launcher(Config(), launcher)


def test_slurm_without_its_commands_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {'PROCID': '0', 'NTASKS': '2', 'NODELIST': 'node[1-2]'}.items():
        monkeypatch.setenv(f'SLURM_{key}', value)
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'):
        monkeypatch.setenv(key, '')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ConfigError, match=r"hostname node\[1-2\]' failed.*set MASTER_ADDR"):
        use_launcher(Config(), 'slurm')
