"""Try mmdet's zoo: each model dense and compressed, one training step, prediction, bake, pack.

Finished configs are skipped, so a stopped run goes on where it was; `--part` splits the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import slope_mm  # noqa: F401 - registers the plug-ins
from slope_mm.engine import launch
from slope_mm.zoo.page import write_page
from slope_mm.zoo.runner import Options, listed, parse_part, run_zoo, select

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'zoo')
    parser.add_argument('--only', nargs='+', default=[], metavar='PATTERN', help='of config paths')
    parser.add_argument('--part', default='1/1', metavar='I/N', help='every N-th config')
    parser.add_argument('--again', action='store_true', help='also what has a result already')
    parser.add_argument('--memory-gb', type=float, default=8.0, help='limit of one trial')
    parser.add_argument('--seconds', type=float, default=900.0, help='limit of one trial')
    parser.add_argument('--list', action='store_true', help='list the configs, and stop')
    parser.add_argument(
        '--report-only', action='store_true', help='write docs/zoo.md from docs/zoo.json, and stop'
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'docs', help='folder of zoo.json and zoo.md'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = Options(
        args.work_dir / 'results.jsonl',
        args.work_dir / 'log.txt',
        parse_part(args.part),
        tuple(args.only),
        args.memory_gb,
        args.seconds,
        args.again,
    )
    if args.list:
        for entry in select(listed(options), options):
            print(entry.config, entry.same_as and f'(the model of {entry.same_as})', entry.problem)
        return
    results = None if args.report_only else run_zoo(options)
    print(write_page(args.out, results))


if __name__ == '__main__':
    launch.run_tool(main)
