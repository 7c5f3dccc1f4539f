"""Train, compress, evaluate and compare a small stock Mask R-CNN: the project's main job.

Data, a dense model from scratch, then naive and SLOPE W4A4 fine-tuned from it on one schedule and
seed, each evaluated by tools/test.py, the compressed ones packed by tools/export.py. Run it again
after an interruption and it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

import slope_mm
from slope_mm.analysis.comparison import ArmResult, write_results
from slope_mm.analysis.demo_pictures import draw_demo
from slope_mm.datasets.shapes import ensure_shapes
from slope_mm.engine import launch
from slope_mm.environment import usable_cores, version_table
from slope_mm.errors import SlopeError

ROOT = Path(__file__).resolve().parent.parent
DATA = Path('data/shapes')


@dataclass(frozen=True)
class Arm:
    """One model of the comparison."""

    name: str
    config: Path
    folder: Path
    start: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of its training."""
        epochs = Config.fromfile(str(self.config)).train_cfg.max_epochs
        return self.folder / f'epoch_{epochs}.pth'

    def has(self, step: str) -> bool:
        """Whether what a step leaves is there."""
        if step.startswith('train'):
            return self.checkpoint.is_file()
        if step.startswith('pack'):
            return self.packed.is_file()
        return any((self.folder / 'test').glob('*/*.json'))

    @property
    def packed(self) -> Path:
        """The packed file, of a compressed arm."""
        return self.folder / 'model.slope'

    @property
    def options(self) -> list[str]:
        """What is overridden in its config."""
        return [] if self.start is None else ['--cfg-options', f'load_from={self.start}']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    return parser.parse_args()


def named_from_here(folder: Path) -> Path:
    """A folder given relative to where the user stands, as the clone sees it."""
    whole = folder.resolve()
    return whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole


def arms(work_dir: Path) -> list[Arm]:
    """The three arms; both compressed ones start from the first."""
    configs = ROOT / 'configs'
    fp32 = Arm('fp32', configs / 'mask_rcnn_r18_shapes_scratch.py', work_dir / 'fp32')
    return [
        fp32,
        *(
            Arm(
                name,
                configs / f'mask_rcnn_r18_shapes_{name}_w4a4.py',
                work_dir / name,
                fp32.checkpoint,
            )
            for name in ('naive', 'slope')
        ),
    ]


class Steps:
    """Runs each step once: a finished one is remembered with a hash of what it depends on."""

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / 'steps.json'
        # Arms run side by side.
        self.lock = threading.Lock()
        self.done: dict[str, Any] = {}
        if self.path.exists():
            try:
                self.done = json.loads(self.path.read_text())
            except ValueError:
                raise SlopeError(
                    f"'{self.path}' is damaged, so what was done is not known; remove it, or choose"
                    ' another --work-dir'
                ) from None

    def run(self, name: str, arm: Arm, command: list[str], after: str = '') -> str:
        """Runs a command unless it is done; returns the hash that later steps depend on."""
        text = Config.fromfile(str(arm.config)).pretty_text
        key = hashlib.sha256('\n'.join([text, *command, after]).encode()).hexdigest()[:16]
        before = self.done.get(name, {})
        made = arm.has(name)
        if before.get('key') == key and before.get('finished') and made:
            print(f'{name}: done before ({before["seconds"]:.0f} s)', flush=True)
            return key
        if not before and name.startswith('train') and any(arm.folder.glob('*.pth')):
            raise SlopeError(
                f"'{arm.folder}' holds checkpoints of which '{self.path}' does not say what they"
                ' are; move them elsewhere, or choose another --work-dir'
            )
        if before and before['key'] != key and name.startswith('train'):
            # Checkpoints of another config must not be resumed.
            for stale in arm.folder.glob('*.pth'):
                stale.unlink()
            (arm.folder / 'last_checkpoint').unlink(missing_ok=True)
        spent = before['seconds'] if before.get('key') == key else 0.0
        self.done[name] = {'key': key, 'finished': False, 'seconds': spent}
        self._save()
        print(f'{name}: {" ".join(["python", *command])}', flush=True)
        started = time.monotonic()
        try:
            run_logged(command, arm.folder / f'{name.replace(" ", "_")}.log', arm.name)
            self.done[name]['finished'] = True
        finally:
            self.done[name]['seconds'] += time.monotonic() - started
            self._save()
        return key

    def _save(self) -> None:
        with self.lock:
            partial = self.path.with_suffix('.part')
            partial.write_text(json.dumps(self.done, indent=2))
            partial.replace(self.path)


PROGRESS = re.compile(
    r'Epoch\(train\)\s+\[(?P<epoch>\d+)\]\[\s*(?P<at>\d+)/(?P<of>\d+)\].* eta: (?P<eta>[\d:]+)'
    r'.* loss: (?P<loss>[\d.]+)'
)
SCORE = re.compile(r'coco/bbox_mAP: (?P<box>[\d.]+).*coco/segm_mAP: (?P<mask>[\d.]+)')
COSINE = re.compile(r'slope_cosine_mean: (?P<cosine>[\d.]+)')


def environment() -> dict[str, str]:
    """Half of the cores for each process, since two run side by side.

    The model is so small that on a busy machine several threads wait for each other longer than
    they compute.
    """
    threads = max(1, usable_cores() // 2)
    return {'OMP_NUM_THREADS': str(threads), **os.environ}


def run_logged(command: list[str], log: Path, label: str) -> None:
    """Runs a tool, shows its progress, keeps its output in a file.

    Raises:
        SlopeError: If it fails; with its last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        last: list[str] = []
        for line in process.stdout or ():
            file.write(line)
            file.flush()
            last = [*last[-19:], line]
            show_progress(line, label)
        if process.wait() != 0:
            raise SlopeError(
                f'{command[0]} failed with exit code {process.returncode}; its output is in {log}:'
                f' {"".join(last[-3:]).strip()}'
            )


def show_progress(line: str, label: str) -> None:
    """Prints the short form of a line of mmengine's log, if it is worth it."""
    if found := PROGRESS.search(line):
        cosine = COSINE.search(line)
        extra = f'  mean cosine {cosine["cosine"]}' if cosine else ''
        print(
            f'  {label:<5}  epoch {found["epoch"]:>2} {found["at"]:>3}/{found["of"]}'
            f'  loss {found["loss"]}{extra}  ETA {found["eta"]}',
            flush=True,
        )
    elif found := SCORE.search(line):
        print(f'  {label:<5}  box mAP {found["box"]}  mask mAP {found["mask"]}', flush=True)


def evaluation(arm: Arm) -> dict[str, float]:
    """The metrics that the newest tools/test.py run wrote."""
    files = sorted((arm.folder / 'test').glob('*/*.json'))
    return json.loads(files[-1].read_text().splitlines()[-1])


def result(arm: Arm, base_bytes: int | None) -> ArmResult:
    """Metrics, cosine, SQNR and size of one arm."""
    model = launch.build_model(launch.read_config(str(arm.config)))
    launch.load_weights(model, str(arm.checkpoint))
    report = slope_mm.report(model)
    report.to_csv(arm.folder / 'report.csv')
    metrics, totals = evaluation(arm), report.totals
    return ArmResult(
        arm.name,
        metrics['coco/bbox_mAP'],
        metrics['coco/segm_mAP'],
        totals['cosine_mean'],
        totals['sqnr_db'],
        report.stored_bytes,
        (base_bytes or report.dense_bytes) / report.stored_bytes,
        None if arm.start is None else arm.packed.stat().st_size,
    )


def verdict(results: list[ArmResult]) -> list[str]:
    """What came out, whichever way it fell."""
    fp32, naive, slope = results
    kept = min(slope.bbox_mAP / fp32.bbox_mAP, slope.segm_mAP / fp32.segm_mAP)
    packed = fp32.bytes / (slope.file_bytes or slope.bytes)
    goal = 'reaches' if kept >= 0.95 else 'MISSES'
    return [
        f'SLOPE keeps {kept:.1%} of fp32 (the worse of box and mask mAP) and {goal} the goal of'
        f' 95 % at {packed:.1f}x smaller on disk. Against naive: box'
        f' {slope.bbox_mAP - naive.bbox_mAP:+.3f}, mask {slope.segm_mAP - naive.segm_mAP:+.3f}.',
        'One seed; fp32 had no extra epochs, both compressed arms had the same ones. "Stored" is'
        ' calculated: codes of fixed width, index, steps, biases, BN and all that is not'
        " compressed. The packed file (model.slope in the arm's folder) is what is on disk.",
    ]


def train_and_test(steps: Steps, arm: Arm, start: str = '') -> str:
    """All steps of an arm; returns what arms that start from it depend on."""
    config = str(arm.config.relative_to(ROOT))
    train = ['tools/train.py', config, '--work-dir', str(arm.folder), '--resume', *arm.options]
    trained = steps.run(f'train {arm.name}', arm, train, start)
    test = ['tools/test.py', config, str(arm.checkpoint), '--work-dir', str(arm.folder / 'test')]
    steps.run(f'test {arm.name}', arm, test, trained)
    if arm.start is not None:
        pack = ['tools/export.py', 'packed', config, str(arm.checkpoint), str(arm.packed)]
        steps.run(f'pack {arm.name}', arm, pack, trained)
    return trained


def main() -> None:
    args = parse_args()
    args.work_dir = named_from_here(args.work_dir)
    # Configs and tools are named relative to the clone.
    os.chdir(ROOT)
    launch.check_work_dir(str(args.work_dir))
    started = time.monotonic()
    paths = ensure_shapes(DATA)
    print(f'data: {paths.root}', flush=True)
    steps = Steps(args.work_dir)
    everything = arms(args.work_dir)
    dense, *compressed = everything
    start = train_and_test(steps, dense)
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(train_and_test, steps, arm, start) for arm in compressed]:
            future.result()
    results: list[ArmResult] = []
    for arm in everything:
        results.append(result(arm, results[0].bytes if results else None))
    notes = verdict(results)
    facts = {
        'seconds': {name: round(step['seconds'], 1) for name, step in steps.done.items()},
        'environment': version_table().splitlines(),
    }
    write_results(results, args.work_dir, notes, facts)
    by_name = {arm.name: (str(arm.config), str(arm.checkpoint)) for arm in everything}
    draw_demo(by_name, args.work_dir)
    print(f'\n{(args.work_dir / "results.md").read_text()}')
    print(
        f'In {args.work_dir}: results.md, results.json, detections.png, cosine.png'
        f' ({(time.monotonic() - started) / 60:.1f} minutes this time)'
    )


if __name__ == '__main__':
    try:
        launch.run_tool(main)
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; run it again and it goes on from here')
