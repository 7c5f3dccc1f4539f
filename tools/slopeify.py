"""Write the short child config that gives a stock mmdet config SLOPE, and print the plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.utils import get_installed_path

import slope_mm  # noqa: F401 - registers the plug-ins
from slope_mm.analysis.plan import child_config, config_report, read_recipe
from slope_mm.engine import launch
from slope_mm.engine.config_files import check_out, write_config
from slope_mm.engine.dense_start import refuse_compressed
from slope_mm.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / 'configs' / '_base_' / 'recipes'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help='a stock config: a file, or mmdet::folder/name.py for one of mmdet'
    )
    parser.add_argument(
        '--recipe',
        # What came closest to fp32 in docs/results: the regularizer is yours to ask for.
        default='naive_w4a4',
        help='a recipe of configs/_base_/recipes, or a file of your own (default: %(default)s)',
    )
    parser.add_argument(
        '--load-from',
        help="the trained detector to compress: a checkpoint or URL (default: config's)",
    )
    parser.add_argument('-o', '--out', type=Path, help='the config to write; none: print the plan')
    parser.add_argument('--force', action='store_true', help='replace OUT where it exists')
    return parser.parse_args()


def installed_config(name: str) -> str:
    """The path of ``package::folder/name.py``."""
    package, relative = name.split('::', 1)
    try:
        return str(Path(get_installed_path(package)) / '.mim' / 'configs' / relative)
    except Exception as error:  # its errors have no common base but this one
        raise ConfigError(
            f"'{name}' is of the package '{package}', which is not installed; install it, or give"
            ' the path of a config file'
        ) from error


def main() -> None:
    args = parse_args()
    path = installed_config(args.config) if '::' in args.config else args.config
    if args.out is not None:
        check_out(args.out, path, args.force)
    config = launch.read_config(path)
    if args.load_from is not None:
        refuse_compressed(args.load_from)
        launch.check_checkpoint(launch.build_model(config), args.load_from, complete=False)
        config.load_from = args.load_from
    recipe = read_recipe(args.recipe, RECIPES)
    plan = config_report(config, recipe['recipe'], f'{args.config} with recipe {args.recipe}')
    print(plan)
    if args.out is not None:
        text = child_config(args.config, config, recipe, args.out)
        write_config(args.out, text)
        print(f'\nWrote {args.out}: python tools/train.py {args.out}')
        if not config.get('load_from'):
            print('First set load_from in it: the trained detector to compress')


if __name__ == '__main__':
    launch.run_tool(main)
