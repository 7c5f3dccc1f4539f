"""The options of a small shapes set, and what a folder contains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    'seed': 3,
    'num_train': 24,
    'num_val': 6,
    'image_size': (72, 96),
    'max_objects': 6,
    'object_size': (16, 48),
    'num_classes': 6,
}


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob('*')) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
