"""What a shapes data set is made with: classes, and options that are checked."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

from slope_mm.errors import DataError

SHAPES_CLASSES = ('circle', 'triangle', 'square', 'star', 'cross', 'ring')
_PALETTE = (
    (230, 57, 70),
    (42, 157, 143),
    (69, 123, 230),
    (244, 190, 60),
    (160, 90, 210),
    (240, 130, 40),
)


def shapes_metainfo(num_classes: int = 5) -> dict[str, Any]:
    """``metainfo`` for ``CocoDataset``: the first ``num_classes`` classes and their colours."""
    return {'classes': SHAPES_CLASSES[:num_classes], 'palette': list(_PALETTE[:num_classes])}


SHAPES_METAINFO = shapes_metainfo()


@dataclasses.dataclass(frozen=True)
class ShapesOptions:
    """What a shapes data set is made with; checked when it is built.

    Args:
        seed: Any integer ≥ 0.
        num_train: Number of training images, 1 to 1,000,000.
        num_val: Number of validation images, 1 to 1,000,000.
        image_size: Height and width in pixels, each 16 to 4096.
        min_objects: Fewest figures in an image, ≥ 1.
        max_objects: Most figures in an image. An image gets fewer than its random count where no
            place is left that keeps every figure recognisable, never fewer than ``min_objects``.
        object_size: Smallest and largest diameter, in pixels, of the circle around a figure.
        num_classes: 4 to 6: the first so many of ``SHAPES_CLASSES``.

    Raises:
        DataError: A value is of the wrong type or outside its range.
    """

    seed: int = 0
    num_train: int = 1000
    num_val: int = 200
    image_size: tuple[int, int] = (128, 128)
    min_objects: int = 1
    max_objects: int = 5
    object_size: tuple[int, int] = (24, 72)
    num_classes: int = 5

    def __post_init__(self) -> None:
        _check_int('seed', self.seed, 0)
        # File names have six digits.
        _check_int('num_train', self.num_train, 1, 10**6)
        _check_int('num_val', self.num_val, 1, 10**6)
        _check_pair('image_size', self.image_size, 16, 4096)
        _check_int('min_objects', self.min_objects, 1)
        _check_int('max_objects', self.max_objects, self.min_objects)
        _check_pair('object_size', self.object_size, 12, 4096)
        _check_int('num_classes', self.num_classes, 4, len(SHAPES_CLASSES))
        (height, width), (smallest, largest) = self.image_size, self.object_size
        if smallest > largest:
            raise DataError(
                f'shapes: object_size is (smallest, largest), got ({smallest}, {largest})'
            )
        if largest > min(height, width):
            raise DataError(
                f'shapes: objects of up to {largest} px do not fit into images of '
                f'{height}x{width} px; lower object_size or raise image_size'
            )

    @classmethod
    def of(cls, **options: Any) -> ShapesOptions:
        """Build options as a user writes them: by name, with ``image_size`` also as one number.

        Raises:
            DataError: An unknown name (the message lists the known ones) or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise DataError(
                f'shapes: unknown option {", ".join(unknown)}; known are {", ".join(known)}'
            )
        if _is_int(options.get('image_size')):
            options['image_size'] = (options['image_size'],) * 2
        for name in ('image_size', 'object_size'):
            if isinstance(options.get(name), list):
                options[name] = tuple(options[name])
        return cls(**options)

    def command(self, root: str | os.PathLike[str]) -> str:
        """The command line that remakes ``root`` with these options."""
        height, width = self.image_size
        return (
            f'python tools/make_shapes.py {shlex.quote(str(root))} --force --seed {self.seed} '
            f'--train {self.num_train} --val {self.num_val} --size {height} {width} '
            f'--min-objects {self.min_objects} --max-objects {self.max_objects} '
            f'--object-size {self.object_size[0]} {self.object_size[1]} '
            f'--classes {self.num_classes}'
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, lowest: int, highest: int | None = None) -> None:
    limits = f'at least {lowest}' if highest is None else f'{lowest} to {highest}'
    if not isinstance(value, int) or not _is_int(value):
        raise DataError(f'shapes: {name} must be an integer ({limits}), got {value!r}')
    if value < lowest or (highest is not None and value > highest):
        raise DataError(f'shapes: {name} must be {limits}, got {value}')


def _check_pair(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise DataError(f'shapes: {name} must be a pair of integers, got {value!r}')
    for number in value:
        _check_int(name, number, lowest, highest)
