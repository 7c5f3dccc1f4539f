"""zoo.json and zoo.md from a run's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_page(folder: Path, results: dict[str, dict[str, Any]] | None) -> str:
    """Placeholder."""
    return ''
