"""One input step for all levels of a shared head, or one for each level: what is the difference?

Compresses a dense model without training, measures how well the inputs of the layers that run once
a pyramid level survive quantization either way, and evaluates both.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

from mmengine.config import Config
from torch import nn

import slope_mm  # noqa: F401 - registers the plug-ins and the safe checkpoint loader
from slope_mm.analysis.levels import LevelStep, level_steps, own_steps
from slope_mm.engine import launch
from slope_mm.engine.calibration_images import calibration_batches, run_losses
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.engine.data_files import check_data
from slope_mm.errors import ConfigError
from slope_mm.oneshot.command import compress


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config with a SlopeModel that quantizes activations')
    parser.add_argument('checkpoint', help='its dense start: a checkpoint of the stock model')
    parser.add_argument('--batches', type=int, default=8, help='training batches to measure on')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    return parser.parse_args()


def table(steps: list[LevelStep]) -> str:
    """A row per layer and level."""
    lines = [
        '| layer | level | own step | one step (dB) | own step (dB) |',
        '|---|---|---|---|---|',
    ]
    lines += [
        f'| `{s.layer}` | {s.level} | {s.step:.4f} | {s.one_db:.1f} | {s.own_db:.1f} |'
        for s in steps
    ]
    return '\n'.join(lines)


def metrics(config: Config, model: nn.Module, steps: list[LevelStep]) -> dict[str, float]:
    """The model's metrics on the test set, with the given steps a level."""
    config = copy.deepcopy(config)
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir, config.load_from, config.resume = folder, None, False
        # mmengine keeps runs and visualizers by name.
        config.experiment_name = Path(folder).name
        if config.get('visualizer'):
            config.visualizer.update(name=config.experiment_name, vis_backends=None)
        runner = launch.build_runner(config)
        runner.model.load_state_dict(model.state_dict())
        with own_steps(runner.model, steps):
            found: dict[str, float] = runner.test()
    return found


def main() -> None:
    args = parse_args()
    config = launch.read_config(args.config, args.cfg_options)
    check_data(config.get('train_dataloader'), 'train_dataloader')
    check_data(config.get('test_dataloader'), 'test_dataloader')
    model, _, _ = compress(config, args.checkpoint, batches=args.batches)
    batches = calibration_batches(config, args.batches)
    steps = level_steps(model, [lambda: run_losses(model, batches)])
    if not steps:
        raise ConfigError('no layer with a quantized input runs more than once in a forward')
    print(table(steps))
    for name, chosen in (('one step for all levels', []), ('one step a level', steps)):
        for metric, value in metrics(config, model, chosen).items():
            print(f'{name}: {metric} {value:.4f}')


if __name__ == '__main__':
    launch.run_tool(main)
