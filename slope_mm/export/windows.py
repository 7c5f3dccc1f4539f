"""The windows of a convolution side by side, in nodes of ONNX's own.

One Gather copies them, whole pixels at a time, from places that are computed beforehand: slices
that are concatenated would copy everything twice. Places are constants where the map's size is
known (RoI features), and cheap sums of a few numbers where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from slope_mm.export.nodes import NodeWriter, tag


@dataclass(frozen=True)
class Window:
    """What a convolution looks at: sizes in rows and columns."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> Window:
        """From a node's attributes."""
        names = ('kernel_shape', 'strides', 'dilations')
        return cls(*(tuple(attributes[name]) for name in names))

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Row and column of each pixel, counted from the first."""
        return [(i * self.dilations[0], j * self.dilations[1]) for i, j in np.ndindex(*self.kernel)]

    def reach(self, axis: int) -> int:
        """From the first to the last pixel."""
        return (self.kernel[axis] - 1) * self.dilations[axis]


def unfold(
    writer: NodeWriter,
    pixels: str,
    channels: int,
    window: Window,
    strips: int = 1,
    size: tuple[int, int] | None = None,
) -> list[str]:
    """Writes what makes of a map ``[n, h, w, c]`` its windows ``[n, h', w', i * j * c]``.

    Args:
        writer: Where to.
        pixels: The map, padded already.
        channels: Its ``c``.
        window: Which pixels.
        strips: In how many about equal strips of rows.
        size: Its height and width, where they are always the same.

    Returns:
        The names of the strips.
    """
    if window.kernel == window.strides == (1, 1):
        return [pixels]
    sizes = (*window.kernel, *window.strides, *window.dilations)
    name = f'{pixels}.windows.{tag(sizes)}'
    if size is None:
        places = _computed_places(writer, pixels, name, window, strips)
    else:
        places = [writer.constant(f'{name}.places', _known_places(window, size))]
    flat = writer.once('Reshape', [pixels, writer.numbers([0, -1, channels])], f'{pixels}.flat')
    length = writer.numbers([0, 0, 0, len(window.positions) * channels])
    rows = []
    for place in places:
        found = writer.once('Gather', [flat, place], f'{place}.pixels', axis=1)
        rows.append(writer.once('Reshape', [found, length], f'{place}.rows'))
    return rows


def _known_places(window: Window, size: tuple[int, int]) -> np.ndarray:
    """Numbers of pixels, counted line by line: ``[h', w', i * j]``."""
    rows, columns = (
        np.arange(0, size[axis] - window.reach(axis), window.strides[axis]) for axis in (0, 1)
    )
    within = np.array([i * size[1] + j for i, j in window.positions])
    first = rows[:, None] * size[1] + columns
    return (first[:, :, None] + within).astype(np.int64)


def _computed_places(
    writer: NodeWriter, pixels: str, name: str, window: Window, strips: int
) -> list[str]:
    """The same where sizes are known when the graph runs, a strip of rows at a time."""
    once, numbers = writer.once, writer.numbers
    width = once('Shape', [pixels], f'{pixels}.width', start=2, end=3)
    rows, columns = (_first_pixels(writer, pixels, name, window, axis) for axis in (0, 1))
    jumps = once('Mul', [width, numbers(i for i, _ in window.positions)], f'{name}.jumps')
    within = once('Add', [jumps, numbers(j for _, j in window.positions)], f'{name}.within')
    upright = once('Unsqueeze', [columns, numbers([1])], f'{name}.upright')
    line = once('Add', [upright, within], f'{name}.line')
    lines = once('Mul', [rows, width], f'{name}.lines')
    places = []
    for strip in _strips_of(writer, lines, strips):
        deep = once('Unsqueeze', [strip, numbers([1, 2])], f'{strip}.deep')
        places.append(once('Add', [deep, line], f'{strip}.places'))
    return places


def _first_pixels(writer: NodeWriter, pixels: str, name: str, window: Window, axis: int) -> str:
    """First rows, or columns, of all windows."""
    out = f'{name}.first.{axis}'
    size = writer.once('Shape', [pixels], f'{out}.size', start=axis + 1, end=axis + 2)
    room = writer.once('Sub', [size, writer.numbers([window.reach(axis)])], f'{out}.room')
    end = writer.once('Squeeze', [room], f'{out}.end')
    start, step = (writer.constant(f'number.{n}', np.int64(n)) for n in (0, window.strides[axis]))
    return writer.once('Range', [start, end, step], out)


def _strips_of(writer: NodeWriter, lines: str, count: int) -> list[str]:
    """About equal shares of a vector."""
    if count == 1:
        return [lines]
    name = f'{lines}.{count}'
    length = writer.once('Shape', [lines], f'{name}.length')
    shares = writer.once('Mul', [length, writer.numbers(range(count + 1))], f'{name}.shares')
    borders = writer.once('Div', [shares, writer.numbers([count])], f'{name}.borders')
    ends = [
        writer.once(
            'Slice', [borders, writer.numbers([i]), writer.numbers([i + 1])], f'{name}.border.{i}'
        )
        for i in range(count + 1)
    ]
    return [
        writer.once('Slice', [lines, ends[i], ends[i + 1]], f'{name}.{i}') for i in range(count)
    ]
