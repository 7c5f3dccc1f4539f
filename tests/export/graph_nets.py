"""Small nets for the graphs, and their graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import slope_mm
from slope_mm.export.graph import LayerCall, lower, with_int4
from slope_mm.export.integer import to_integer
from slope_mm.export.layers import describe_layers
from slope_mm.export.runtime import for_this_machine, open_session, outputs_of
from slope_mm.export.skeleton import marked, trace


class Net(nn.Module):
    """Every kind of layer, a residual, results that several quantizers want, both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16))
        self.wide = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(32)
        )
        self.narrow = nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16))
        self.strided = nn.Conv2d(16, 24, 3, 2, 1)
        self.point = nn.Conv2d(16, 24, 1, 2)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.tiling = nn.ConvTranspose2d(24, 8, 2, 2)
        self.overlapping = nn.ConvTranspose2d(24, 8, 3, 2, padding=1, output_padding=1)
        self.mixed = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 12)
        self.out = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x).relu()
        x = (x + self.narrow(self.wide(x).relu())).relu()
        x = self.strided(x) - self.point(x)
        x = self.grouped(x)
        up = self.tiling(x)
        y = self.mixed(up.relu()) + self.mixed(self.overlapping(x))
        return up, self.out(self.fc(y.mean((2, 3)).relu()))


def recipe(
    codes: str = 'lsq',
    bits: int = 4,
    activation: int | None = 4,
    sparsity: str | None = '2:4',
    step: str = 'channel',
) -> dict[str, Any]:
    """A recipe without exceptions: every layer gets what is asked for."""
    weight = dict(sparsity=sparsity, bits=bits, codes=codes, step=step)
    return dict(weight=weight, activation=dict(bits=activation) if activation else None)


def net(settings: dict[str, Any] | None, seed: int = 0) -> nn.Module:
    """A net in evaluation with norms of both signs, compressed and calibrated."""
    torch.manual_seed(seed)
    model: nn.Module = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    if settings is not None:
        model = compressed(model, settings)
    # A dead channel, once the steps stand.
    model.stem[1].weight.data[0] = 0
    return model.eval()


def compressed(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A model in evaluation, compressed and calibrated on an image."""
    model = slope_mm.convert(model, settings)
    for layer in slope_mm.compressed_layers(model).values():
        layer.begin_observing()
    model.eval()(image())
    for layer in slope_mm.compressed_layers(model).values():
        (seen,) = layer.end_observing()
        if seen.seen:
            layer.set_activation_range(torch.cat(seen.samples), bool(seen.low < 0))
    return model


def image(batch: int = 1, height: int = 40, width: int = 48, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def graphs(
    model: nn.Module, int4: bool = False, x: Tensor | None = None
) -> tuple[onnx.ModelProto, onnx.ModelProto, list[LayerCall]]:
    """The portable graph, the one for the CPU provider, and the calls of layers.

    Height and width are those of ``x``, or any where none is given.
    """
    axes = {0: 'batch', 2: 'height', 3: 'width'} if x is None else {0: 'batch'}
    x = image() if x is None else x
    with marked(model) as copied:
        skeleton = trace(copied, x, 'images', ['up', 'scores'], axes)
    portable, calls = lower(skeleton, describe_layers(model))
    cpu = to_integer(portable, x.shape)
    if int4:
        portable = with_int4(portable)
    for graph in (portable, cpu):
        onnx.checker.check_model(graph)
    return portable, cpu, calls


def run(graph: onnx.ModelProto, x: Tensor, optimize: bool = True) -> list[np.ndarray]:
    content = for_this_machine(graph.SerializeToString())
    return outputs_of(open_session(content, 1, optimize), x)


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers by name, as numpy arrays."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
