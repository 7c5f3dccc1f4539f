"""Print what a config's recipe does to each layer: the plan, or with a checkpoint the result."""

from __future__ import annotations

import argparse

import slope_mm
from slope_mm.analysis.plan import config_report
from slope_mm.engine import launch
from slope_mm.engine.config_options import ConfigOptions


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


if __name__ == '__main__':
    launch.run_tool(main)
