"""Images that lie in one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS

from slope_mm.errors import DataError

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp')


@DATASETS.register_module()
class ImageFolders(BaseDataset):
    """``data_root/data_prefix['img_path']/CLASS/*.jpg``; classes in the order of their names.

    Args:
        **kwargs: Those of mmengine's ``BaseDataset``. ``metainfo=dict(classes=…)`` fixes the
            classes and their order.

    Raises:
        DataError: If the folder is missing, holds no class with images, or has a class that
            ``metainfo`` does not know.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict an image: ``img_path`` and ``gt_label``."""
        root = Path(self.data_prefix['img_path'])
        if not root.is_dir():
            raise DataError(
                f"there is no folder '{root}'; put a folder a class into it, or set data_root"
            )
        found = {
            folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
            for folder in sorted(root.iterdir())
            if folder.is_dir()
        }
        found = {name: images for name, images in found.items() if images}
        if not found:
            raise DataError(f"'{root}' has no folder with images in it; it needs one a class")
        classes = self._metainfo.setdefault('classes', tuple(found))
        unknown = sorted(found.keys() - set(classes))
        if unknown:
            raise DataError(
                f"'{root}' has the class {unknown[0]!r}, which is not among those of metainfo:"
                f' {", ".join(map(str, classes))}'
            )
        return [
            {'img_path': str(image), 'gt_label': classes.index(name)}
            for name, images in found.items()
            for image in images
        ]


@TRANSFORMS.register_module()
class PackImage:
    """The end of a pipeline: an image of mmcv's transforms as what :class:`Classifier` takes."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """``{'inputs': tensor [3, H, W] of the image's dtype, 'data_samples': label}``."""
        image = np.ascontiguousarray(results['img'].transpose(2, 0, 1))
        return {'inputs': torch.from_numpy(image), 'data_samples': int(results['gt_label'])}

    def __repr__(self) -> str:
        return 'PackImage()'
