"""The shapes data set: a small instance segmentation task that is made, not downloaded.

Every image shows a few plane figures on a textured background. Colour, size, rotation and stretch
are random, so that only the form tells the class; later figures cover earlier ones. A set is laid
out for mmdet's stock ``CocoDataset``::

    root/
      annotations/train.json   annotations/val.json    COCO, masks as compressed RLE
      train/000000.png …       val/000000.png …
      meta.json                what the set was made with

Load it with ``LoadAnnotations(with_bbox=True, with_mask=True)``. Under ``poly2mask=False``, as in
its ``…-poly-…`` configs, mmdet silently ignores every instance whose mask is RLE, and training then
learns that images are empty.

Image ``i`` of a split is drawn from ``np.random.default_rng([seed, split, i])`` alone: a larger
set begins with the images of the smaller one, and the same options give the same bytes (for the
same versions of numpy and OpenCV).
"""

from __future__ import annotations

import colorsys
import dataclasses
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

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
_SPLITS = ('train', 'val')

_GENERATOR = 'slope_mm.datasets.shapes'
# Raise it with every change that alters the bytes of a set: an older set is then no longer taken
# for the one that is asked for.
_VERSION = 1

# An instance keeps at least this part of its whole figure in sight, and this many pixels: below
# that a person would be guessing the class as well.
_MIN_VISIBLE_SHARE = 0.4
_MIN_VISIBLE_PIXELS = 24
_PLACEMENT_ATTEMPTS = 40
_SUPERSAMPLING = 4

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Outline = list[NDArray[np.float64]]


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
    num_train: int = 600
    num_val: int = 100
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


@dataclasses.dataclass(frozen=True)
class ShapesPaths:
    """Where the parts of a shapes data set lie."""

    root: Path

    @property
    def train_annotations(self) -> Path:
        """COCO json of the training images."""
        return self.root / 'annotations' / 'train.json'

    @property
    def val_annotations(self) -> Path:
        """COCO json of the validation images."""
        return self.root / 'annotations' / 'val.json'

    @property
    def train_images(self) -> Path:
        """Folder of the training images."""
        return self.root / 'train'

    @property
    def val_images(self) -> Path:
        """Folder of the validation images."""
        return self.root / 'val'

    @property
    def meta(self) -> Path:
        """What the set was made with; it stands only in a complete set."""
        return self.root / 'meta.json'


def make_shapes(
    root: str | os.PathLike[str], *, force: bool = False, **options: Any
) -> ShapesPaths:
    """Make a shapes data set in ``root``.

    The set is written beside ``root`` and renamed at the end, so that an interruption leaves
    either no ``root`` or the one that was there.

    Args:
        root: Folder to make; it may exist if it is empty.
        force: Replace a shapes data set that is already there. Anything else is never replaced.
        **options: The fields of :class:`ShapesOptions`; ``image_size`` may be one number.

    Returns:
        The paths of the set's parts.

    Raises:
        DataError: Bad options, ``root`` holds something already, or it cannot be written.
    """
    chosen = ShapesOptions.of(**options)
    paths = ShapesPaths(Path(root))
    _refuse_to_overwrite(paths, chosen, force)
    # A link stays a link: the set is made where it points to.
    target = paths.root.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f'.{target.name}.making.', dir=target.parent))
        try:
            fresh = workshop / 'new'
            _write_set(ShapesPaths(fresh), chosen)
            if force and target.exists():
                target.rename(workshop / 'old')
            fresh.rename(target)
        finally:
            _put_back(workshop / 'old', target)
            shutil.rmtree(workshop, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"shapes: cannot make the data set in '{paths.root}': {error.strerror or error}; "
            f'free that place, make it writable, or choose another folder'
        ) from error
    return paths


def ensure_shapes(root: str | os.PathLike[str], **options: Any) -> ShapesPaths:
    """Make a shapes data set in ``root`` unless exactly that set is there already.

    Several processes may call it at once for the same set: the first to finish wins.

    Args:
        root: Folder of the set.
        **options: The fields of :class:`ShapesOptions`; ``image_size`` may be one number.

    Returns:
        The paths of the set's parts.

    Raises:
        DataError: Bad options, something else is in ``root``, or it cannot be written. What is
            there is never changed.
    """
    chosen = ShapesOptions.of(**options)
    paths = ShapesPaths(Path(root))
    if _holds(paths, chosen):
        return paths
    try:
        return make_shapes(root, **dataclasses.asdict(chosen))
    except DataError:
        if _holds(paths, chosen):
            return paths
        raise


# ---- the folder ----------------------------------------------------------------------------------


def _read_meta(paths: ShapesPaths) -> dict[str, Any] | None:
    """``meta.json`` as this module writes it, or None where there is no such file."""
    try:
        meta = json.loads(paths.meta.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(meta, dict) and meta.get('generator') == _GENERATOR
    return meta if is_ours and isinstance(meta.get('options'), dict) else None


def _plain(options: ShapesOptions) -> dict[str, Any]:
    """The options as JSON gives them back: pairs are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    return plain


def _missing_parts(paths: ShapesPaths) -> list[str]:
    """Parts that someone removed after the set was made."""
    parts = (
        paths.train_annotations,
        paths.val_annotations,
        paths.train_images,
        paths.val_images,
    )
    return [str(part.relative_to(paths.root)) for part in parts if not part.exists()]


def _differences(paths: ShapesPaths, options: ShapesOptions) -> list[str]:
    """What tells the shapes set in ``paths`` from the one that is asked for, as phrases."""
    meta = _read_meta(paths)
    if meta is None:
        return [f'is not a shapes data set (no readable {paths.meta.name})']
    found, asked = meta['options'], _plain(options)
    phrases = [
        f'has {name}={found.get(name)}, asked for {value}'
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if meta.get('version') != _VERSION:
        phrases.append(f'was made by generator version {meta.get("version")}, not {_VERSION}')
    phrases += [f'has lost {part}' for part in _missing_parts(paths)]
    return phrases


def _holds(paths: ShapesPaths, options: ShapesOptions) -> bool:
    return not _differences(paths, options)


def _is_empty(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


def _refuse_to_overwrite(paths: ShapesPaths, options: ShapesOptions, force: bool) -> None:
    """Raise ``DataError`` unless ``paths.root`` is free, or a shapes set that may be replaced."""
    try:
        is_free = _is_empty(paths.root)
    except OSError as error:
        raise DataError(
            f"shapes: cannot look into '{paths.root}': {error.strerror}; "
            f'make it readable or choose another folder'
        ) from error
    is_shapes = _read_meta(paths) is not None
    if is_free or (force and is_shapes):
        return
    found = '; '.join(_differences(paths, options)) or 'is the same shapes data set'
    remedy = f'remake it with `{options.command(paths.root)}`, or' if is_shapes else 'please'
    raise DataError(
        f"shapes: '{paths.root}' {found}. Nothing was changed; {remedy} choose another folder"
    )


def _put_back(old: Path, target: Path) -> None:
    """Undo the first half of a replacement whose second half did not happen."""
    if old.exists() and not target.exists():
        old.rename(target)


def _write_set(paths: ShapesPaths, options: ShapesOptions) -> None:
    for folder in (paths.train_annotations.parent, paths.train_images, paths.val_images):
        folder.mkdir(parents=True)
    _write_split(paths.train_images, paths.train_annotations, options, options.num_train)
    _write_split(paths.val_images, paths.val_annotations, options, options.num_val)
    meta = {
        'generator': _GENERATOR,
        'version': _VERSION,
        'options': _plain(options),
        'made_with': {'numpy': np.__version__, 'opencv': cv2.__version__},
    }
    paths.meta.write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')


def _write_split(folder: Path, json_path: Path, options: ShapesOptions, count: int) -> None:
    height, width = options.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = _draw_scene(options, folder.name, index)
        image_id = index + 1
        name = f'{index:06d}.png'
        _, encoded = cv2.imencode('.png', np.ascontiguousarray(scene.image[..., ::-1]))
        # Not cv2.imwrite: that answers a full disk with False instead of an error.
        (folder / name).write_bytes(encoded.tobytes())
        images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
        for figure in scene.figures:
            number = len(annotations) + 1
            annotations.append({'id': number, 'image_id': image_id, **_annotation(figure)})
    categories = [
        {'id': number, 'name': name, 'supercategory': 'shape'}
        for number, name in enumerate(SHAPES_CLASSES[: options.num_classes], start=1)
    ]
    coco = {
        'info': {'description': f'slope_mm shapes, {folder.name}', 'version': str(_VERSION)},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': categories,
    }
    json_path.write_text(json.dumps(coco, separators=(',', ':')), encoding='utf-8')


def _annotation(figure: _Figure) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(figure.visible.astype(np.uint8)))
    rle['counts'] = rle['counts'].decode('ascii')
    return {
        'category_id': figure.label + 1,
        'iscrowd': 0,
        'area': int(mask_utils.area(rle)),
        'bbox': [float(value) for value in mask_utils.toBbox(rle)],
        'segmentation': rle,
    }


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
class _Figure:
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
class _Scene:
    """``image`` is RGB, uint8 [H, W, 3] when finished and float32 0..255 while it is drawn."""

    image: NDArray[Any]
    figures: list[_Figure]


def _draw_scene(options: ShapesOptions, split: str, index: int) -> _Scene:
    rng = np.random.default_rng([options.seed, _SPLITS.index(split), index])
    scene = _Scene(_background(rng, options.image_size), [])
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
    scene: _Scene, ground: FloatArray, rng: np.random.Generator, options: ShapesOptions
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
    scene.figures.append(_Figure(label, colour, solid, whole_area))
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
