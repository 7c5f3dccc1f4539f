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

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from slope_mm.datasets.shape_options import (
    SHAPES_CLASSES,
    SHAPES_METAINFO,
    ShapesOptions,
    shapes_metainfo,
)
from slope_mm.datasets.shape_scenes import Figure, draw_scene
from slope_mm.errors import DataError

__all__ = [
    'SHAPES_CLASSES',
    'SHAPES_METAINFO',
    'ShapesOptions',
    'ShapesPaths',
    'ensure_shapes',
    'make_shapes',
    'shapes_metainfo',
]


_GENERATOR = 'slope_mm.datasets.shapes'
# Raise it with every change that alters the bytes of a set: an older set is then no longer taken
# for the one that is asked for.
_VERSION = 1


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
        force: Replace a shapes data set that is already there. Anything else is never replaced, nor
            is a set beside which other files lie.
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


def _missing_parts(paths: ShapesPaths, options: ShapesOptions) -> list[str]:
    """Parts that someone removed, or emptied, after the set was made."""
    parts = [paths.train_annotations, paths.val_annotations]
    for folder, count in (
        (paths.train_images, options.num_train),
        (paths.val_images, options.num_val),
    ):
        parts += [folder / _image_name(index) for index in range(count)]
    lost = [str(part.relative_to(paths.root)) for part in parts if not _has_content(part)]
    return lost if len(lost) < 4 else [*lost[:3], f'and {len(lost) - 3} files more']


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _image_name(index: int) -> str:
    return f'{index:06d}.png'


def _foreign_files(paths: ShapesPaths) -> list[str]:
    """What lies in a set's folder and is none of its files."""
    own = {paths.meta, paths.train_annotations, paths.val_annotations}
    folders = {paths.train_annotations.parent, paths.train_images, paths.val_images}
    foreign = []
    for path in sorted(paths.root.rglob('*')):
        is_image = path.parent in (paths.train_images, paths.val_images) and re.fullmatch(
            r'\d{6}\.png', path.name
        )
        if path not in own and path not in folders and not is_image:
            foreign.append(str(path.relative_to(paths.root)))
    return foreign


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
    phrases += [f'has lost {part}' for part in _missing_parts(paths, options)]
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
    if is_free:
        return
    if force and is_shapes:
        foreign = _foreign_files(paths)
        if not foreign:
            return
        more = f' and {len(foreign) - 3} more' if len(foreign) > 3 else ''
        raise DataError(
            f"shapes: '{paths.root}' holds files that are not the data set's:"
            f' {", ".join(foreign[:3])}{more}. Nothing was changed; move them elsewhere, or choose'
            ' another folder'
        )
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
        scene = draw_scene(options, folder.name, index)
        image_id = index + 1
        name = _image_name(index)
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


def _annotation(figure: Figure) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(figure.visible.astype(np.uint8)))
    rle['counts'] = rle['counts'].decode('ascii')
    return {
        'category_id': figure.label + 1,
        'iscrowd': 0,
        'area': int(mask_utils.area(rle)),
        'bbox': [float(value) for value in mask_utils.toBbox(rle)],
        'segmentation': rle,
    }
