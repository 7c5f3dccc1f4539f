"""Accuracy of :class:`~slope_mm.classification.Classifier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from slope_mm.errors import ConfigError


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """The share of images (%) whose label is among the k best scores: ``accuracy/top1``, ….

    Args:
        topk: The k to report.
        **kwargs: Those of mmengine's ``BaseMetric``.

    Raises:
        ConfigError: If a k is no number >= 1.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not topk or any(not isinstance(k, int) or k < 1 for k in topk):
            raise ConfigError(f'TopKAccuracy topk={topk!r}; write numbers >= 1, such as (1, 5)')
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keeps the rank of each image's label: how many classes score higher, or as high with a
        lower index. A score that is no number is higher than any."""
        for sample in data_samples:
            scores, label = sample['scores'], int(sample['label'])
            # Not `>`: a label's NaN is below everything, itself included.
            better = ~(scores <= scores[label])
            tied = scores[:label] == scores[label]
            self.results.append(int(better.sum() + tied.sum()))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Percentages of the whole set."""
        ranks = torch.tensor(results)
        return {f'top{k}': 100.0 * float((ranks < k).double().mean()) for k in self.topk}
