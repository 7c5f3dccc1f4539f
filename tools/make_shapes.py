"""Make the shapes data set: python tools/make_shapes.py OUT [--train N --val N …]."""

from __future__ import annotations

import argparse
import sys

from slope_mm.datasets.shapes import ShapesOptions, ensure_shapes, make_shapes
from slope_mm.errors import SlopeError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the defaults are those of ``ShapesOptions``."""
    default = ShapesOptions()
    parser = argparse.ArgumentParser(
        description='Make a COCO-style data set of plane shapes. A set that is already there with '
        'the same options is left as it is; a different one is an error unless --force is given.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('out', metavar='OUT', help='folder to make')
    add('--seed', type=int, default=default.seed, help='random seed')
    add('--train', type=int, default=default.num_train, help='number of training images')
    add('--val', type=int, default=default.num_val, help='number of validation images')
    add(
        '--size',
        type=int,
        nargs='+',
        default=list(default.image_size),
        metavar='PX',
        help='image height and width, or one number for both',
    )
    add('--min-objects', type=int, default=default.min_objects, help='fewest figures in an image')
    add('--max-objects', type=int, default=default.max_objects, help='most figures in an image')
    add(
        '--object-size',
        type=int,
        nargs=2,
        default=list(default.object_size),
        metavar=('MIN', 'MAX'),
        help='diameter of the circle around a figure in pixels',
    )
    add('--classes', type=int, default=default.num_classes, help='number of classes, 4 to 6')
    add('--force', action='store_true', help='remake a shapes data set that is already there')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: the set could not be made)."""
    args = parse_arguments(arguments)
    options = {
        'seed': args.seed,
        'num_train': args.train,
        'num_val': args.val,
        'image_size': args.size[0] if len(args.size) == 1 else args.size,
        'min_objects': args.min_objects,
        'max_objects': args.max_objects,
        'object_size': args.object_size,
        'num_classes': args.classes,
    }
    try:
        if args.force:
            paths = make_shapes(args.out, force=True, **options)
        else:
            paths = ensure_shapes(args.out, **options)
    except SlopeError as error:
        print(f'make_shapes: {error}', file=sys.stderr)
        return 2
    print(f'{paths.root}: {args.train} training and {args.val} validation images')
    return 0


if __name__ == '__main__':
    sys.exit(main())
