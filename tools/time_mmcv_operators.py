"""Time mmcv's RoIAlign and NMS on one core, to compare builds of mmcv: one line of medians.

Run it in turns with the builds to compare (`PYTHONPATH=FOLDER` puts another build first).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mmcv
import torch
from mmcv.ops import RoIAlign, nms

REPEATS = 9


def median_ms(run: Callable[[], object]) -> float:
    """Median duration of a call in milliseconds, after one that does not count."""
    run()
    seen = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seen.append(time.perf_counter() - started)
    return sorted(seen)[REPEATS // 2] * 1e3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = torch.randn(1, 256, 100, 168)
    corners = torch.rand(256, 2) * 400
    rois = torch.cat([torch.zeros(256, 1), corners, corners + 400 * torch.rand(256, 2)], 1)
    align = RoIAlign(7, 0.25, 0)
    boxes = torch.rand(4000, 2) * 800
    boxes = torch.cat([boxes, boxes + 200 * torch.rand(4000, 2)], 1)
    scores = torch.rand(4000)
    roi_align_ms = median_ms(lambda: align(features, rois))
    nms_ms = median_ms(lambda: nms(boxes, scores, 0.7))
    print(f'{mmcv.__file__}: RoIAlign {roi_align_ms:.1f} ms, NMS {nms_ms:.1f} ms')


if __name__ == '__main__':
    main()
