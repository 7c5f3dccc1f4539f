"""What a benchmark prints and saves: a table, and the machine that it speaks of."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import torch

from slope_mm.version import __version__


def machine() -> dict[str, Any]:
    """Machine, versions and threads."""
    return dict(
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        mmcv=mmcv.__version__,
        mmengine=mmengine.__version__,
        mmdet=mmdet.__version__,
        slope_mm=__version__,
    )


def _processor() -> str:
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table, columns in the first row's order."""
    if not rows:
        return '(no rows)'
    columns = list(rows[0])
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        '| '
        + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + ' |'
        for line in cells
    ]
    rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
    return '\n'.join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 100 else f'{value:.0f}'
    return '' if value is None else str(value)


def save(path: str | Path, benchmark: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes ``{"benchmark", "machine", "rows", ...}`` as json, in one piece."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(benchmark=benchmark, machine=machine(), **more, rows=rows)
    draft = path.with_suffix('.part')
    draft.write_text(json.dumps(content, indent=1) + '\n')
    draft.replace(path)
    return path
