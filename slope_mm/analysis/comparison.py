"""Arms side by side: one row an arm, as a table, as JSON, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slope_mm.analysis.figures import save_figure


@dataclass(frozen=True)
class ArmResult:
    """What one arm reached.

    Attributes:
        arm: Its name.
        bbox_mAP: COCO box mAP, 0 to 1.
        segm_mAP: COCO mask mAP, 0 to 1.
        cosine: Mean cosine over layers; None for an arm that is not compressed.
        sqnr_db: Mean SQNR in dB; None for an arm that is not compressed.
        bytes: Stored size, calculated by :mod:`slope_mm.analysis.size`.
        ratio: Dense size by stored size.
        file_bytes: Length of the packed file; None where there is none.
    """

    arm: str
    bbox_mAP: float
    segm_mAP: float
    cosine: float | None
    sqnr_db: float | None
    bytes: int
    ratio: float
    file_bytes: int | None = None


def markdown_table(arms: Sequence[ArmResult]) -> str:
    """The arms as a markdown table, the first one being what the others are compared with."""
    base = arms[0]
    lines = [
        '| arm | box mAP | mask mAP | of fp32 (box / mask) | mean cosine | SQNR (dB) | stored |'
        ' ratio | packed file | ratio |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for arm in arms:
        share = f'{_share(arm.bbox_mAP, base.bbox_mAP)} / {_share(arm.segm_mAP, base.segm_mAP)}'
        cosine = '–' if arm.cosine is None else f'{arm.cosine:.4f}'
        sqnr = '–' if arm.sqnr_db is None else f'{arm.sqnr_db:.2f}'
        lines.append(
            f'| {arm.arm} | {arm.bbox_mAP:.3f} | {arm.segm_mAP:.3f} | {share} | {cosine} | {sqnr}'
            f' | {arm.bytes / 1e6:.2f} MB | {arm.ratio:.1f}x | {_file(arm)} |'
        )
    return '\n'.join(lines)


def _file(arm: ArmResult) -> str:
    """Length of the packed file, and how much smaller it is than the dense size."""
    if arm.file_bytes is None:
        return '– | –'
    dense = arm.bytes * arm.ratio
    return f'{arm.file_bytes:,} bytes | {dense / arm.file_bytes:.1f}x'


def _share(value: float, base: float) -> str:
    return f'{value / base:.1%}' if base > 0 else '–'


def write_results(
    arms: Sequence[ArmResult], folder: Path, notes: Sequence[str], facts: dict[str, Any]
) -> None:
    """Writes ``results.md`` and ``results.json``.

    Args:
        arms: Rows.
        folder: Where to.
        notes: Sentences below the table.
        facts: Versions, machine, times: kept in the JSON beside ``arms``.
    """
    text = [markdown_table(arms), '', *notes, '']
    _replace(folder / 'results.md', '\n'.join(text))
    content = {'arms': [asdict(arm) for arm in arms], **facts}
    _replace(folder / 'results.json', json.dumps(content, indent=2) + '\n')


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + '.part')
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: [n, 4], x1 y1 x2 y2 in pixels.
        masks: [n, H, W], bool.
        labels: [n], class indices.
        scores: [n].
    """

    boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def draw_detections(
    images: Sequence[np.ndarray],
    found: Mapping[str, Sequence[Detections]],
    classes: Sequence[str],
    path: Path,
    score: float = 0.6,
) -> None:
    """Draws what several arms find in the same images, one row an arm.

    Args:
        images: RGB, uint8.
        found: Detections of each image by arm.
        classes: Class names.
        path: A PNG file.
        score: Detections below it are left out.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(images), 2.75 * len(found)), layout='constrained')
    grid = figure.subplots(len(found), len(images), squeeze=False)
    colours = matplotlib.colormaps['tab10'](np.arange(len(classes)) % 10)
    for row, (arm, detections) in zip(grid, found.items(), strict=True):
        for axes, image, one in zip(row, images, detections, strict=True):
            _draw_image(axes, image, one, classes, colours, score)
        row[0].set_ylabel(arm, fontsize=11)
    save_figure(figure, path)


def _draw_image(
    axes: Any,
    image: np.ndarray,
    found: Detections,
    classes: Sequence[str],
    colours: np.ndarray,
    score: float,
) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(image, interpolation='nearest')
    axes.set_xticks([])
    axes.set_yticks([])
    for box, mask, label, value in zip(
        found.boxes, found.masks, found.labels, found.scores, strict=True
    ):
        if value < score:
            continue
        colour = colours[label]
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask] = (*colour[:3], 0.45)
        axes.imshow(overlay, interpolation='nearest')
        x1, y1, x2, y2 = box
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.2)
        )
        axes.text(
            x1 + 1,
            max(y1 - 2, 5),
            f'{classes[label]} {value:.2f}',
            fontsize=6,
            color='white',
            bbox={'facecolor': colour, 'edgecolor': 'none', 'pad': 0.8},
        )
