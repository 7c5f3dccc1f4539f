"""Print what a config's recipe does to each layer: the plan, or with a checkpoint the result."""

from __future__ import annotations

import argparse
from pathlib import Path

import slope_mm
from slope_mm.analysis.plan import config_report
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions
from slope_mm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config with a SlopeModel')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint of that config')
    parser.add_argument('--csv', help='also write the rows to this file')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings of the config'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.csv:
        check_csv(args.csv, args.config, args.checkpoint)
    config = launch.read_config(args.config, args.cfg_options)
    if args.checkpoint is None:
        result = config_report(config, title=f'Plan of {args.config}')
    else:
        model = launch.build_model(config)
        launch.load_weights(model, args.checkpoint)
        result = slope_mm.report(model, title=f'{args.checkpoint} of {args.config}')
    print(result)
    if args.checkpoint is not None and str(args.checkpoint).endswith('.slope'):
        print(
            'Cosine and SQNR compare a weight with its compressed form, and a packed file has the'
            ' compressed form alone: they say nothing here; give the checkpoint for them.'
        )
    if args.csv:
        result.to_csv(args.csv)


def check_csv(path: str, *inputs: str | None) -> None:
    """Refuses to write over what is read, or over a file that is no table.

    Raises:
        ConfigError: If it would be.
    """
    own = any(given and Path(given).resolve() == Path(path).resolve() for given in inputs)
    if own or (Path(path).exists() and Path(path).suffix != '.csv'):
        raise ConfigError(
            f"--csv '{path}' would be written over, and is no table; give another name, that ends"
            " in '.csv'"
        )


if __name__ == '__main__':
    launch.run_tool(main)
