"""``--launcher``: the processes of mmengine's launchers, also on machines without a GPU."""

from __future__ import annotations

import os
import subprocess

import torch
from mmengine.config import Config

from slope_mm.engine.mixed_precision import has_accelerator
from slope_mm.errors import ConfigError

# What each launcher tells its processes, and what starts it.
VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        'MASTER_ADDR',
    ),
}
STARTED_BY = {
    'pytorch': 'torchrun (tools/dist_train.sh)',
    'slurm': 'srun (tools/slurm_train.sh)',
    'mpi': "Open MPI's mpirun, with MASTER_ADDR set to the first machine (docs/distributed.md)",
}
DEFAULT_PORT = '29500'


def use_launcher(config: Config, launcher: str) -> None:
    """Makes a config train or test on several processes.

    With a GPU mmengine does the rest. It sets a CUDA device for each process and gives DDP one;
    without a GPU the processes talk by gloo instead, and DDP gets none.

    Args:
        config: The config to change.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Raises:
        ConfigError: If this process was not started by that launcher.
    """
    config.launcher = launcher
    if launcher == 'none':
        return
    missing = [name for name in VARIABLES[launcher] if name not in os.environ]
    if missing:
        raise ConfigError(
            f'--launcher {launcher}: the variable {missing[0]} is not set; the processes have to be'
            f' started by {STARTED_BY[launcher]}'
        )
    if has_accelerator():
        return
    if not torch.distributed.is_initialized():
        _name_process(launcher)
        torch.distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )
    config.model_wrapper_cfg = config.get('model_wrapper_cfg') or wrapper


def _name_process(launcher: str) -> None:
    """Sets torch's variables from those of Slurm or MPI, by mmengine's rules."""
    variables = os.environ
    if launcher == 'slurm':
        variables['RANK'] = variables['SLURM_PROCID']
        variables['WORLD_SIZE'] = variables['SLURM_NTASKS']
        variables['LOCAL_RANK'] = variables.get('SLURM_LOCALID', variables['RANK'])
        if 'MASTER_ADDR' not in variables:
            variables['MASTER_ADDR'] = _first_host(variables['SLURM_NODELIST'])
    if launcher == 'mpi':
        variables['RANK'] = variables['OMPI_COMM_WORLD_RANK']
        variables['WORLD_SIZE'] = variables['OMPI_COMM_WORLD_SIZE']
        variables['LOCAL_RANK'] = variables['OMPI_COMM_WORLD_LOCAL_RANK']
    variables.setdefault('MASTER_PORT', DEFAULT_PORT)


def _first_host(nodes: str) -> str:
    command = ['scontrol', 'show', 'hostname', nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"--launcher slurm: '{' '.join(command)}' failed ({error}); set MASTER_ADDR to the"
            ' first machine'
        ) from None
    return done.stdout.split()[0]
