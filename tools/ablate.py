"""Run a study: train and evaluate its arms, and report what came out with error bars.

Run it again after an interruption and it goes on; what is finished is skipped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

import slope_mm  # noqa: F401 - registers the plug-ins and the safe checkpoint loader
from slope_mm.engine import launch
from slope_mm.errors import ConfigError
from slope_mm.studies.command import Options, run_study
from slope_mm.studies.processes import LAUNCHERS, ROOT


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('study', type=Path, help='study file, or its name in configs/studies')
    parser.add_argument('--quick', action='store_true', help="the study's short form")
    parser.add_argument('--report-only', action='store_true', help='redraw from results.json')
    parser.add_argument('--plan', action='store_true', help='list what would run, and stop')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/studies')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of results.json, results.md and figures; default: WORK_DIR/STUDY',
    )
    parser.add_argument('--arms', nargs='+', help='only these arms (names or patterns)')
    parser.add_argument('--tasks', nargs='+', help='only these tasks')
    parser.add_argument('--seeds', nargs='+', type=int, help='only these seeds')
    parser.add_argument('--jobs', type=int, default=1, help='trials side by side')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none')
    parser.add_argument('--processes', type=int, default=1, help='ranks (GPUs) of one trial')
    parser.add_argument('--partition', default='', help="Slurm's partition")
    parser.add_argument(
        '--threads', type=int, default=1, help='OpenMP threads of a rank; changes results slightly'
    )
    return parser.parse_args()


def interrupt(*_: object) -> None:
    """A terminated study ends like an interrupted one."""
    raise KeyboardInterrupt


def main() -> None:
    args = parse_args()
    for name in ('jobs', 'processes', 'threads'):
        if getattr(args, name) < 1:
            raise ConfigError(f'--{name} {getattr(args, name)} is no number >= 1')
    given = {name: getattr(args, name) for name in ('study', 'work_dir', 'out')}
    absolute = {name: path and Path(path).absolute() for name, path in given.items()}
    # Configs and data are named relative to the clone.
    os.chdir(ROOT)
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, interrupt)
    if not run_study(Options(**{**vars(args), **absolute})):
        raise SystemExit(1)


if __name__ == '__main__':
    try:
        launch.run_tool(main)
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; run it again and it goes on from here')
