"""Kill a training run again and again, and see that nothing is lost (docs/reliability.md).

A small SLOPE run on the CPU goes through once undisturbed. The same run is then killed (SIGKILL) at
random moments, half of them while a checkpoint is being written, resumed with ``--resume``, and
killed again. Every line of losses and the last checkpoint have to be those of the undisturbed run,
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import train
from mmengine.config import Config

from slope_mm.datasets.shapes import ensure_shapes
from slope_mm.engine import launch
from slope_mm.engine.checkpoint import load_checkpoint_file
from slope_mm.engine.storage import POINTER
from slope_mm.errors import SlopeError
from slope_mm.wholefile import write_whole

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'mask_rcnn_r18_shapes_slope_w4a4.py'
# Of the clock, or of looks at what only one process has seen.
VOLATILE = ('time', 'data_time', 'slope_flip_rate')


class LostError(SlopeError):
    """Something was lost."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    kills = commands.add_parser('kills', help='kill a training run at random moments')
    kills.add_argument('--runs', type=int, default=20, help='how many times; default 20')
    kills.add_argument('--epochs', type=int, default=6, help='length of the run; default 6')
    kills.add_argument('--images', type=int, default=16, help='images an epoch; default 16')
    kills.add_argument('--seed', type=int, default=0, help='of the moments')
    kills.add_argument('--work-dir', type=Path, default=Path('work_dirs/reliability'))
    return parser.parse_args()


# --- one run -------------------------------------------------------------------------------------


def write_config(folder: Path, epochs: int, images: int) -> Path:
    """The demo's SLOPE arm, on images of 64 px, a checkpoint an epoch, the newest two kept."""
    data = folder / 'shapes'
    ensure_shapes(
        data, num_train=images, num_val=4, image_size=64, object_size=(20, 40), max_objects=3
    )
    config = Config.fromfile(CONFIG)
    config.load_from = None
    config.train_dataloader.update(batch_size=2)
    config.train_dataloader.dataset.data_root = f'{data}/'
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.train_cfg.max_epochs = epochs
    config.default_hooks.logger.interval = 1
    for hook in config.custom_hooks:
        if hook.type == 'slope_mm.SlopeMonitorHook':
            hook.interval = 1  # a look for every line
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=2)
    path = folder / 'config.py'
    config.dump(path)
    return path


def start(config: Path, work_dir: Path) -> int:
    """Runs tools/train.py --resume in a child process; its number.

    A fork of this process, which has imported everything: a start takes a second, not ten.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(work_dir / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ['train.py', str(config), '--work-dir', str(work_dir), '--resume']
        launch.run_tool(train.main)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, *, wait: bool) -> int | None:
    """How a child ended, or None while it runs."""
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def losses(work_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """What was logged for each iteration, by every process that came to it."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line in which it was killed
            if 'loss' in row:
                plain = {key: value for key, value in row.items() if key not in VOLATILE}
                rows.setdefault(row['step'], []).append(plain)
    return rows


# --- many kills ----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: Processes killed.
        writing: Of these, while a temporary file of a checkpoint was there.
        finished: Runs that came to their end and were compared.
        lines: Lines of losses that were compared.
        checkpoints: Checkpoints that were read back after a kill.
    """

    kills: int = 0
    writing: int = 0
    finished: int = 0
    lines: int = 0
    checkpoints: int = 0
    moments: list[float] = field(default_factory=list)


def partials(work_dir: Path) -> list[Path]:
    """Temporary files of checkpoints."""
    return list(work_dir.glob('.*.pth.*.part'))


def kill_at(child: int, moment: Callable[[], bool]) -> bool:
    """Kills a child at a moment; False if it came to its end before."""
    while not moment():
        status = ended(child, wait=False)
        if status is not None:
            if status:
                raise LostError(f'a resumed run failed with status {status}')
            return False
    os.kill(child, signal.SIGKILL)
    return ended(child, wait=True) == -signal.SIGKILL


def moment_of(work_dir: Path, span: float, rng: random.Random, writing: bool) -> Callable[[], bool]:
    """Anywhere in a run, or a little after a checkpoint's temporary file has appeared."""
    begin = time.monotonic()
    if not writing:
        after = rng.uniform(0, span)

        def anywhere() -> bool:
            time.sleep(0.001)
            return time.monotonic() - begin > after

        return anywhere
    stale = set(partials(work_dir))
    # The first new checkpoint of this process, or a later one.
    wanted = rng.choice((1, 1, 2))
    delay = rng.uniform(0, 0.01)
    seen: set[Path] = set()

    def while_writing() -> bool:
        time.sleep(0.001)
        seen.update(set(partials(work_dir)) - stale)
        if len(seen) < wanted:
            return False
        time.sleep(delay)
        return True

    return while_writing


def check_checkpoints(work_dir: Path, tally: Tally) -> None:
    """Every checkpoint in the folder can be read, and the pointer names one of them."""
    for path in work_dir.glob('*.pth'):
        load_checkpoint_file(path)
        tally.checkpoints += 1
    pointer = work_dir / POINTER
    if pointer.exists() and pointer.read_text() and not Path(pointer.read_text()).exists():
        raise LostError(f'{pointer} names a checkpoint that is gone')


def compare(work_dir: Path, whole: Path, tally: Tally) -> None:
    """The killed run's losses and last checkpoint are the undisturbed run's.

    Raises:
        LostError: If anything differs.
    """
    wanted, found = losses(whole), losses(work_dir)
    if missing := wanted.keys() - found.keys():
        raise LostError(f'{work_dir} never came to iterations {sorted(missing)}')
    for step, rows in found.items():
        for row in rows:
            if row != wanted[step][0]:
                raise LostError(f'{work_dir}, iteration {step}: {row} is not {wanted[step][0]}')
            tally.lines += 1
    last = max(whole.glob('epoch_*.pth'), key=lambda path: path.stat().st_mtime_ns).name
    ours, theirs = (load_checkpoint_file(folder / last) for folder in (work_dir, whole))
    for key in ('state_dict', 'optimizer'):
        if not _same(ours[key], theirs[key]):
            raise LostError(f'{work_dir / last} differs from {whole / last} in its {key}')
    tally.finished += 1


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def kills(args: argparse.Namespace) -> Tally:
    """Kills and resumes until ``args.runs`` processes were killed, then lets the last run end."""
    folder = args.work_dir.resolve() / time.strftime('%Y%m%d_%H%M%S')
    folder.mkdir(parents=True)
    config = write_config(folder, args.epochs, args.images)
    begin, whole = time.monotonic(), folder / 'whole'
    if ended(start(config, whole), wait=True):
        raise LostError(f'the undisturbed run failed: {whole / "output.txt"}')
    span = time.monotonic() - begin
    rng, tally, number = random.Random(args.seed), Tally(), 0
    while tally.kills < args.runs:
        work_dir = folder / f'killed_{number}'
        child = start(config, work_dir)
        # Half of a run: many kills fall on its way, few runs end before.
        moment = moment_of(work_dir, span / 2, rng, writing=tally.kills % 2 == 1)
        begin, before = time.monotonic(), set(partials(work_dir))
        if kill_at(child, moment):
            tally.kills += 1
            tally.moments.append(round(time.monotonic() - begin, 3))
            tally.writing += bool(set(partials(work_dir)) - before)
            check_checkpoints(work_dir, tally)
        else:
            compare(work_dir, whole, tally)
            number += 1
    work_dir = folder / f'killed_{number}'
    if ended(start(config, work_dir), wait=True):
        raise LostError(f'the last resumed run failed: {work_dir / "output.txt"}')
    compare(work_dir, whole, tally)
    if left := partials(work_dir):
        raise LostError(f'{left} was left behind')
    write_whole(folder / 'kills.json', (json.dumps(vars(tally), indent=1) + '\n').encode())
    print(
        f'{tally.kills} kills, {tally.writing} of them in the middle of a checkpoint;'
        f' {tally.checkpoints} checkpoints read back, all complete; {tally.finished} runs came to'
        f' their end; {tally.lines} lines of losses and {tally.finished} last checkpoints equal'
        f' the undisturbed run ({span:.1f} s) bit for bit'
    )
    return tally


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    kills(args)


if __name__ == '__main__':
    launch.run_tool(main)
