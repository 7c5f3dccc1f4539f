"""Reads packed files with numpy and safetensors alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slope_mm.errors import PackedFileError
from slope_mm.packing.codec import decode_step, decode_weight, weight_values
from slope_mm.packing.container import Container, StoredTensor, parse_container, read_container
from slope_mm.packing.dtypes import NUMPY_DTYPES, as_float32
from slope_mm.packing.layout import FLOAT_BYTES, LARGEST_STEP, SECOND_VERSION, WeightLayout

# A constant costs the file nothing, whatever its shape.
LARGEST_CONSTANT = 2**31


@dataclass(frozen=True)
class PackedLayer:
    """A compressed layer as it lies in the file.

    Attributes:
        name: Qualified name.
        layout: What the header says of its weight.
        payload: Steps, index and codes.
    """

    name: str
    layout: WeightLayout
    payload: NDArray[np.uint8]

    @property
    def key(self) -> str:
        """The weight's key in the stock model's state dict."""
        return weight_key(self.name, self.layout.key)

    @property
    def step(self) -> NDArray | None:
        """Steps that broadcast to the weight; None where it is not quantized."""
        return decode_step(self.layout, self.payload)

    def decode(self) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """Codes (int8, 0 where masked; or values where it is not quantized) and mask.

        Both have the weight's shape; the mask is None where the weight is dense.

        Raises:
            PackedFileError: If the bytes are not what the header says.
        """
        try:
            return decode_weight(self.layout, self.payload)
        except PackedFileError as error:
            raise _about(self.key, error) from None

    def weight(self) -> NDArray:
        """The compressed weight."""
        return weight_values(self.layout, *self.decode(), self.step)


class PackedFile:
    """A packed file whose checksums and header were right; weights are decoded when asked for.

    Attributes:
        header: The header.
        layers: Compressed layers by name.
        plain: Everything else by its state-dict key: arrays; bfloat16 as float32.
        aliases: Further state-dict keys of shared tensors, and the key that they stand for.
    """

    def __init__(self, container: Container) -> None:
        self.header = container.header
        tensors = dict(container.tensors)
        defaults = _section(self.header, 'layer_defaults')
        self.layers = {}
        for name, entry in _section(self.header, 'layers').items():
            whole = {**defaults, **entry} if isinstance(entry, dict) else entry
            layer = self.layers[name] = _layer(name, whole, tensors)
            if layer.layout.version > self.header['version']:
                fields = sorted(whole.keys() & set(SECOND_VERSION))
                raise PackedFileError(
                    f"tensor '{layer.key}': the header has unknown fields {fields}"
                )
        narrowed = _section(self.header, 'narrowed')
        self.plain = {key: _plain(key, t, narrowed.get(key)) for key, t in tensors.items()}
        weights = {layer.key for layer in self.layers.values()}
        for key, entry in _section(self.header, 'constants').items():
            if key in self.plain or key in weights:
                raise PackedFileError(f"the header tells of tensor '{key}' twice")
            self.plain[key] = _constant(key, entry)
        self.aliases = _section(self.header, 'aliases')
        own = {*self.plain, *weights}
        for key, target in self.aliases.items():
            if not isinstance(target, str) or target not in own or key in own:
                raise PackedFileError(f"tensor '{key}' stands for {target!r:.80}, which cannot be")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PackedFile:
        """Opens a file.

        Raises:
            PackedFileError: If it is missing, no packed file, of another version, or damaged.
        """
        container = read_container(path)
        try:
            return cls(container)
        except PackedFileError as error:
            raise PackedFileError(f'{os.fspath(path)}: {error}') from None

    @classmethod
    def parse(cls, content: bytes, name: str) -> PackedFile:
        """As :meth:`open`, of a file's content; ``name`` is for messages."""
        return cls(parse_container(content, name))

    def keys(self) -> Iterator[str]:
        """The state-dict keys of the stock model."""
        yield from self.plain
        for layer in self.layers.values():
            yield layer.key
        yield from self.aliases


class PackedWeights(dict[str, NDArray]):
    """The stock model's state dict as arrays; weights are those that the model computes with.

    Attributes:
        header: The file's header: recipe, layers, config, and what else it tells.
        layers: Compressed layers by name, for codes, masks and steps.
    """

    def __init__(self, file: PackedFile) -> None:
        super().__init__(file.plain)
        self.header = file.header
        self.layers = file.layers
        for layer in file.layers.values():
            self[layer.key] = layer.weight()
        for key, target in file.aliases.items():
            self[key] = self[target]


def read_packed(path: str | os.PathLike[str]) -> PackedWeights:
    """Reads a packed file with numpy alone: no torch, no model.

    Args:
        path: The file.

    Returns:
        Arrays by the stock model's state-dict keys (bfloat16 as float32); ``.header`` and
        ``.layers`` tell the rest.

    Raises:
        PackedFileError: If the file is missing, damaged, of another version, or lies about itself;
            names the tensor where one is concerned.
    """
    file = PackedFile.open(path)
    try:
        return PackedWeights(file)
    except PackedFileError as error:
        raise PackedFileError(f'{os.fspath(path)}: {error}') from None


def _section(header: dict[str, Any], key: str) -> dict[str, Any]:
    section = header.get(key, {})
    if not isinstance(section, dict):
        raise PackedFileError(f"the header's '{key}' is not an object")
    return section


def weight_key(name: str, key: str | None) -> str:
    """The state-dict key of a layer's weight, if its entry has this ``key``."""
    return f'{name}.weight' if key is None else key


def _about(key: str, error: PackedFileError) -> PackedFileError:
    return PackedFileError(f"tensor '{key}': {error}")


def _layer(name: str, entry: Any, tensors: dict[str, StoredTensor]) -> PackedLayer:
    given = entry.get('key') if isinstance(entry, dict) else None
    key = weight_key(name, given if isinstance(given, str) else None)
    stored = tensors.pop(key, None)
    if stored is None or stored.dtype != 'U8':
        raise PackedFileError(f"tensor '{key}' of a compressed layer is missing")
    try:
        layout = WeightLayout.from_json(entry, stored.data.size)
    except PackedFileError as error:
        raise _about(key, error) from None
    layer = PackedLayer(name, layout, stored.data)
    step = None if layer.step is None else layer.step.astype(np.float32)
    # So that every code times its step is a number.
    if step is not None and not np.all((step > 0) & (step < LARGEST_STEP)):
        raise PackedFileError(f"tensor '{key}': its steps are not positive numbers")
    return layer


def _plain(key: str, tensor: StoredTensor, dtype: Any) -> NDArray:
    array = as_float32(tensor.array(), tensor.dtype)
    if dtype is None:
        return array
    if not isinstance(dtype, str) or dtype not in FLOAT_BYTES or tensor.dtype != 'I8':
        raise PackedFileError(f"tensor '{key}' cannot stand for one of dtype {dtype!r:.80}")
    return array.astype(NUMPY_DTYPES['F32' if dtype == 'BF16' else dtype])


def _constant(key: str, entry: Any) -> NDArray:
    try:
        dtype, shape, value = entry
        if dtype == 'BF16':
            dtype = 'F32'
        numel = math.prod(int(size) for size in shape)
        # A list would be laid out, one number is not.
        is_number = isinstance(value, (bool, int, float))
        if min(shape, default=0) < 0 or numel > LARGEST_CONSTANT or not is_number:
            raise ValueError
        return np.broadcast_to(np.array(value, NUMPY_DTYPES[dtype]), shape)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise PackedFileError(f"tensor '{key}': the header's constant {entry!r:.80} is none") from (
            None
        )
