"""Second moments of what layers get as input, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.layers import CompressedLayer
from slope_mm.layers.activation import first_input
from slope_mm.oneshot.matrix import unfolded_inputs, weight_matrix

# The widest 3x3 of a ResNet has 512 x 9 columns. Wider matrices fall into runs that do not correct
# each other: their cross moments would grow with the square.
MAX_COLUMNS = 4608
# Positions of one call that count, evenly spread; each level of a shared head counts alike.
POSITIONS = 8192


def run_lengths(columns: int, unit: int = 1, limit: int = MAX_COLUMNS) -> list[int]:
    """Lengths of equal runs of columns, at most ``limit`` (or one unit) each, in whole units.

    Args:
        columns: How many there are.
        unit: Group size of the pattern.
        limit: The longest run.
    """
    units = columns // unit
    count = min(units, -(-columns // max(limit // unit * unit, unit)))
    shares = [units * (i + 1) // count - units * i // count for i in range(count)]
    lengths = [share * unit for share in shares]
    lengths[-1] += columns - sum(lengths)
    return lengths


class SecondMoments:
    """``X^T X`` of a layer's unfolded input, for every run of columns.

    Attributes:
        moments: By group of channels, by run, ``[columns, columns]`` in fp32.
    """

    def __init__(self, layer: CompressedLayer) -> None:
        self.layer = layer
        groups, _, columns = weight_matrix(layer, layer.weight).shape
        self.lengths = run_lengths(columns, _unit(layer))
        place = layer.weight.device
        self.moments = [
            [torch.zeros(n, n, device=place) for n in self.lengths] for _ in range(groups)
        ]

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Counts one input."""
        if x.numel() == 0:
            return
        for rows in unfolded_inputs(self.layer, x.float(), POSITIONS):
            for moments, part in zip(self.moments, rows, strict=True):
                for moment, run in zip(moments, part.split(self.lengths, 1), strict=True):
                    moment.addmm_(run.T, run)

    @property
    def seen(self) -> bool:
        """Whether any input was counted that was not zero."""
        return any(bool(moment.any()) for moments in self.moments for moment in moments)


def _unit(layer: CompressedLayer) -> int:
    return int(getattr(layer.slope_spec.pattern, 'm', 1))


def moment_bytes(layer: CompressedLayer) -> int:
    """What :class:`SecondMoments` of a layer will take."""
    groups, _, columns = weight_matrix(layer, layer.weight).shape
    return 4 * groups * sum(n * n for n in run_lengths(columns, _unit(layer)))


def stages(layers: Mapping[str, CompressedLayer], limit: int) -> list[list[str]]:
    """Consecutive layers whose moments fit in memory together; one at least in each stage.

    Args:
        layers: In the order in which they run.
        limit: Bytes.
    """
    found: list[list[str]] = []
    room = 0
    for name, layer in layers.items():
        needed = moment_bytes(layer)
        if not found or needed > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= needed
    return found


@contextmanager
def _watching(moments: Mapping[str, SecondMoments]) -> Iterator[None]:
    def count(moment: SecondMoments) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moment.add(moment.layer.quantized_input(first_input(args, kwargs)))

        return hook

    handles = [
        moment.layer.register_forward_pre_hook(count(moment), with_kwargs=True)
        for moment in moments.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(
    layers: Mapping[str, CompressedLayer], names: Sequence[str], forward: Callable[[], Any]
) -> dict[str, SecondMoments]:
    """Runs the model once and returns the moments of some layers' quantized inputs.

    Args:
        layers: Layers by name.
        names: Those to watch.
        forward: Runs the model on the calibration images.
    """
    moments = {name: SecondMoments(layers[name]) for name in names}
    with _watching(moments):
        forward()
    return moments
