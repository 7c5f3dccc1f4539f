"""Draws the scenes of the shapes data set: figures, their visible masks, and paint."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from slope_mm.datasets.shape_options import SHAPES_CLASSES, ShapesOptions
from slope_mm.errors import DataError

SPLITS = ('train', 'val')
# An instance keeps at least this part of its whole figure in sight, and this many pixels: below
# that a person would be guessing the class as well.
_MIN_VISIBLE_SHARE = 0.4
_MIN_VISIBLE_PIXELS = 24
_PLACEMENT_ATTEMPTS = 40
_SUPERSAMPLING = 4

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Outline = list[NDArray[np.float64]]


# ---- the figures ---------------------------------------------------------------------------------


def _regular(corners: int) -> Outline:
    """A regular polygon in the unit circle, first corner up. [corners, 2], x right and y down."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return [np.stack([np.sin(angles), -np.cos(angles)], axis=1)]


def _circle() -> Outline:
    return _regular(96)


def _triangle() -> Outline:
    return _regular(3)


def _square() -> Outline:
    half = float(np.sqrt(0.5))
    return [half * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])]


def _star() -> Outline:
    corners = _regular(10)[0]
    corners[1::2] *= 0.45
    return [corners]


def _cross() -> Outline:
    """Two bars whose ends touch the unit circle."""
    half = 0.3
    reach = float(np.sqrt(1 - half**2))
    quarter = np.array([[-half, -half], [-half, -reach], [half, -reach]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    quarters = [quarter]
    for _ in range(3):
        quarters.append(quarters[-1] @ turn)
    return [np.concatenate(quarters)]


def _ring() -> Outline:
    rim = _regular(96)[0]
    return [rim, 0.55 * rim]


# In the order of SHAPES_CLASSES. An outline is a list of closed curves; a point is inside where an
# odd number of them encloses it.
_OUTLINES: dict[str, Callable[[], Outline]] = dict(
    zip(SHAPES_CLASSES, (_circle, _triangle, _square, _star, _cross, _ring), strict=True)
)


@dataclasses.dataclass
class Figure:
    """One placed figure. ``visible`` [H, W] is what later figures have left of it."""

    label: int
    colour: FloatArray
    visible: BoolArray
    whole_area: int

    def survives(self, cover: BoolArray) -> bool:
        """Whether enough of the figure stays in sight under ``cover`` [H, W]."""
        return _is_recognisable(self.visible & ~cover, self.whole_area)


def _is_recognisable(visible: BoolArray, whole_area: int) -> bool:
    least = max(_MIN_VISIBLE_PIXELS, _MIN_VISIBLE_SHARE * whole_area)
    return bool(np.count_nonzero(visible) >= least)


@dataclasses.dataclass
class Scene:
    """``image`` is RGB, uint8 [H, W, 3] when finished and float32 0..255 while it is drawn."""

    image: NDArray[Any]
    figures: list[Figure]


def draw_scene(options: ShapesOptions, split: str, index: int) -> Scene:
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    scene = Scene(_background(rng, options.image_size), [])
    ground = scene.image.mean(axis=(0, 1))
    count = int(rng.integers(options.min_objects, options.max_objects + 1))
    for _ in range(count):
        if not _add_figure(scene, ground, rng, options):
            break
    if len(scene.figures) < options.min_objects:
        raise DataError(
            f'shapes: image {split}/{index} has room for {len(scene.figures)} recognisable '
            f'figures, not for min_objects={options.min_objects}; lower min_objects or '
            f'object_size, or raise image_size'
        )
    noise = rng.normal(0.0, rng.uniform(1.0, 5.0), scene.image.shape)
    scene.image = np.clip(np.rint(scene.image + noise), 0, 255).astype(np.uint8)
    return scene


def _add_figure(
    scene: Scene, ground: FloatArray, rng: np.random.Generator, options: ShapesOptions
) -> bool:
    """Put one more figure on top where all stay recognisable; False where no place was found."""
    height, width = options.image_size
    label = int(rng.integers(options.num_classes))
    for _ in range(_PLACEMENT_ATTEMPTS):
        radius = rng.uniform(*options.object_size) / 2
        # The image's border may cut a little off, as it does in photographs.
        margin = 0.7 * radius
        centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
        outline = _place(SHAPES_CLASSES[label], radius, centre, rng)
        coverage, whole_area = _rasterise(outline, options.image_size)
        solid = coverage >= 0.5
        fits = _is_recognisable(solid, whole_area)
        if fits and all(earlier.survives(solid) for earlier in scene.figures):
            break
    else:
        return False
    colour = _contrasting_colour(rng, [ground, *(figure.colour for figure in scene.figures)])
    for earlier in scene.figures:
        earlier.visible &= ~solid
    scene.figures.append(Figure(label, colour, solid, whole_area))
    _paint(scene.image, coverage, colour, rng)
    return True


def _place(
    name: str, radius: float, centre: tuple[float, float], rng: np.random.Generator
) -> Outline:
    """Stretch, turn and move a unit outline; in pixels, (0, 0) is a corner of the image."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    stretch = np.array([1.0, rng.uniform(0.8, 1.0)])
    return [(curve * stretch * radius) @ turn + centre for curve in _OUTLINES[name]()]


def _rasterise(outline: Outline, image_size: tuple[int, int]) -> tuple[FloatArray, int]:
    """Draw an outline.

    Returns:
        The share of each pixel that the figure covers, float32 [H, W], and the figure's area in
        pixels with the part outside the image.
    """
    height, width = image_size
    points = np.concatenate(outline)
    left, top = (int(value) - 1 for value in np.floor(points.min(axis=0)))
    right, bottom = (int(value) + 1 for value in np.ceil(points.max(axis=0)))
    scale, fraction_bits = _SUPERSAMPLING, 6
    canvas = np.zeros(((bottom - top) * scale, (right - left) * scale), np.uint8)
    # OpenCV counts from pixel centres and takes fixed-point coordinates.
    curves = [((curve - (left, top)) * scale - 0.5) * 2**fraction_bits for curve in outline]
    fixed = [np.rint(curve).astype(np.int32) for curve in curves]
    cv2.fillPoly(canvas, fixed, 1, lineType=cv2.LINE_8, shift=fraction_bits)
    blocks = canvas.reshape(bottom - top, scale, right - left, scale)
    patch = blocks.sum(axis=(1, 3), dtype=np.float32) / scale**2

    coverage = np.zeros((height, width), np.float32)
    rows = slice(max(top, 0), min(bottom, height))
    columns = slice(max(left, 0), min(right, width))
    coverage[rows, columns] = patch[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return coverage, int(np.count_nonzero(patch >= 0.5))


# ---- the paint -----------------------------------------------------------------------------------


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> FloatArray:
    """A random RGB colour, float32 [3] in 0..255."""
    rgb = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, np.float32) * 255


def _contrasting_colour(rng: np.random.Generator, others: list[FloatArray]) -> FloatArray:
    """The first random colour that stands out from ``others``, else the best of twelve."""
    best, best_distance = others[0], -1.0
    for _ in range(12):
        colour = _colour(rng, (0.35, 1.0), (0.45, 1.0))
        distance = min(float(np.linalg.norm(colour - other)) for other in others)
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance > 90:
            break
    return best


def _clouds(rng: np.random.Generator, image_size: tuple[int, int], cells: int) -> FloatArray:
    """Smooth noise in about -1..1, float32 [H, W]; ``cells`` is its coarseness per side."""
    height, width = image_size
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def _ramp(rng: np.random.Generator, image_size: tuple[int, int]) -> FloatArray:
    """A linear gradient in a random direction, float32 [H, W] in -1..1."""
    height, width = image_size
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-1, 1, width, dtype=np.float32) * np.cos(angle)
    down = np.linspace(-1, 1, height, dtype=np.float32) * np.sin(angle)
    return ((across[None] + down[:, None]) / np.sqrt(2)).astype(np.float32)


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> FloatArray:
    """Two muted colours that run into each other, clouded at three scales; [H, W, 3] in 0..255."""
    first = _colour(rng, (0.0, 0.45), (0.25, 0.9))
    second = 0.5 * first + 0.5 * _colour(rng, (0.0, 0.45), (0.25, 0.9))
    blend = 0.5 + 0.5 * _ramp(rng, image_size) + 0.3 * _clouds(rng, image_size, 4)
    blend = np.clip(blend, 0, 1)[..., None]
    light = sum(
        strength * _clouds(rng, image_size, cells)
        for cells, strength in ((5, 16.0), (12, 12.0), (32, 10.0))
    )
    image = first * (1 - blend) + second * blend + np.asarray(light)[..., None]
    return image.astype(np.float32)


def _paint(
    image: FloatArray, coverage: FloatArray, colour: FloatArray, rng: np.random.Generator
) -> None:
    """Lay a figure with soft shading and a faint shadow over ``image``, in place."""
    size = (image.shape[0], image.shape[1])
    # Without the shadow two figures of a like colour would melt into one where they overlap.
    shadow = np.zeros_like(coverage)
    shadow[2:, 1:] = coverage[:-2, :-1]
    image *= 1 - 0.45 * cv2.GaussianBlur(shadow, (0, 0), 2.0)[..., None]
    shade = 1 + 0.14 * _ramp(rng, size) + 0.10 * _clouds(rng, size, 8)
    shade += 0.06 * _clouds(rng, size, 40)
    alpha = coverage[..., None]
    image *= 1 - alpha
    image += alpha * np.clip(colour * shade[..., None], 0, 255)
