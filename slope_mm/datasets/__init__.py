"""The data set that ships with slope_mm."""

from slope_mm.datasets.shapes import (
    SHAPES_CLASSES,
    SHAPES_METAINFO,
    ShapesOptions,
    ShapesPaths,
    ensure_shapes,
    make_shapes,
    shapes_metainfo,
)

__all__ = [
    'SHAPES_CLASSES',
    'SHAPES_METAINFO',
    'ShapesOptions',
    'ShapesPaths',
    'ensure_shapes',
    'make_shapes',
    'shapes_metainfo',
]
