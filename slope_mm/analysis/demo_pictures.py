"""The demo's pictures: detections of the dense model beside SLOPE's, and per-layer cosine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from torch import nn

from slope_mm.analysis.comparison import Detections, draw_detections
from slope_mm.analysis.figures import draw_arms
from slope_mm.analysis.metrics import layer_metrics
from slope_mm.convert import compressed_layers

IMAGES = 5


def draw_demo(arms: Mapping[str, tuple[str, str]], folder: Path) -> None:
    """Draws ``detections.png`` and ``cosine.png``.

    Args:
        arms: Config and checkpoint by arm; ``fp32`` and ``slope`` are shown side by side, and all
            compressed ones in the chart.
        folder: Where to.
    """
    models = {name: _detector(*paths) for name, paths in arms.items()}
    config = Config.fromfile(arms['fp32'][0])
    dataset = config.val_dataloader.dataset
    images = sorted((Path(dataset.data_root) / dataset.data_prefix.img).iterdir())
    shown = images[:: max(1, len(images) // IMAGES)][:IMAGES]
    found = {
        label: [_detect(models[name], str(image)) for image in shown]
        for name, label in (('fp32', 'dense fp32'), ('slope', 'SLOPE 2:4 W4A4'))
    }
    pixels = [_read_rgb(image) for image in shown]
    draw_detections(pixels, found, dataset.metainfo.classes, folder / 'detections.png')
    layers = {name: compressed_layers(model) for name, model in models.items()}
    rows = {
        name: [layer_metrics(layer_name, layer) for layer_name, layer in found_layers.items()]
        for name, found_layers in layers.items()
        if found_layers
    }
    draw_arms(rows, folder / 'cosine.png')


def _detector(config: str, checkpoint: str) -> nn.Module:
    return init_detector(config, checkpoint, device='cpu')


@torch.no_grad()
def _detect(model: nn.Module, image: str) -> Detections:
    found: Any = inference_detector(model, image).pred_instances.cpu().numpy()
    return Detections(found.bboxes, found.masks, found.labels, found.scores)


def _read_rgb(path: Path) -> np.ndarray:
    return np.asarray(mmcv.imread(str(path), channel_order='rgb'))
