"""What the header says of one compressed weight, checked before anything is decoded."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from slope_mm.errors import PackedFileError
from slope_mm.packing.bits import packed_bytes
from slope_mm.packing.entropy import MOST_SYMBOLS_A_BYTE
from slope_mm.packing.groups import rank_bits

CODINGS = ('bitmask', 'enumerative', 'entropy')
#: What a weight of the safetensors dtype takes.
FLOAT_BYTES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2}
MAX_GROUP = 32
MAX_BITS = 8
MAX_INPUTS = 8
# As many as the oldest numpy knows.
MAX_AXES = 32
# 129 of them are a float32.
LARGEST_STEP = 1e36


#: Fields that version 1 does not know.
SECOND_VERSION = ('key', 'inputs', 'standardized')
#: Fields that most layers of a model agree on.
SHARED_FIELDS = ('axis', 'coding', 'pattern', 'n', 'm', 'bits', 'codes', 'qn', 'qp', 'offset')


@dataclass(frozen=True)
class InputQuantizer:
    """A layer's activation quantizer.

    Attributes:
        bits: 2 to 8.
        signed: Whether codes run from ``-2^(bits-1)``; None while it is not calibrated.
        step: Its step (a float32 as a decimal number).
    """

    bits: int
    signed: bool | None
    step: float


@dataclass(frozen=True)
class WeightLayout:
    """How a compressed weight lies in the file; one entry of the header's ``layers``.

    Attributes:
        shape: Shape of the weight.
        dtype: Its safetensors dtype (F32, F16, BF16, F64).
        axis: Axis of the input channels, along which groups run.
        output_axis: Axis of the output channels, along which steps run.
        pattern: The recipe's spelling (``2:4``, ``unstructured:0.5``), or None for dense.
        n: Kept in every group; 0 where the kept weights form no N:M groups.
        m: Group size; 0 where they form none.
        kept: Number of kept weights.
        bits: Bits of a code; None where the kept weights are stored at full precision.
        codes: Name of the code set.
        qn: Smallest code.
        qp: Largest code.
        offset: A weight is ``(code + offset) * step``.
        step: One step for each ``channel``, or one for the ``tensor``.
        step_dtype: Their safetensors dtype (F32, F16, BF16).
        coding: ``bitmask``, ``enumerative`` or ``entropy``.
        index_bytes: Length of the index, which stands between steps and codes.
        input: Activation quantizer, or None.
        gradient: As in the recipe.
        order: As in the recipe.
        note: Why the layer got less than the recipe asked for.
        held: Whether the mask was fixed in training, or followed the latent weight.
        key: The weight's state-dict key where it is not ``NAME.weight``; else None.
        inputs: Activation quantizers of a layer of several inputs; else empty.
        standardized: Whether the weight is what the layer made of its parameter.
    """

    shape: tuple[int, ...]
    axis: int
    kept: int
    output_axis: int = 0
    coding: str = 'enumerative'
    dtype: str = 'F32'
    pattern: str | None = None
    n: int = 0
    m: int = 0
    bits: int | None = None
    codes: str = 'lsq'
    qn: int = 0
    qp: int = 0
    offset: float = 0.0
    step: str = 'channel'
    step_dtype: str = 'F32'
    index_bytes: int = 0
    input: InputQuantizer | None = None
    gradient: str = 'ste'
    order: str = 's_then_q'
    note: str = ''
    held: bool = False
    key: str | None = None
    inputs: tuple[InputQuantizer, ...] = ()
    standardized: bool = False

    @property
    def quantizers(self) -> tuple[InputQuantizer, ...]:
        """The activation quantizers, one an input; empty at full precision."""
        return self.inputs or (() if self.input is None else (self.input,))

    @property
    def version(self) -> int:
        """The version of the format that can tell it."""
        return 2 if any(getattr(self, name) for name in SECOND_VERSION) else 1

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether an index is stored."""
        return self.kept < self.numel

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Shape of the steps, which broadcasts to the weight's."""
        axis = self.output_axis if self.step == 'channel' else None
        return tuple(size if i == axis else 1 for i, size in enumerate(self.shape))

    @property
    def step_bytes(self) -> int:
        """Length of the steps."""
        if self.bits is None:
            return 0
        return math.prod(self.step_shape) * FLOAT_BYTES[self.step_dtype]

    def fixed_index_bytes(self) -> int | None:
        """Length of the index; None where the coding does not fix it."""
        if not self.sparse:
            return 0
        if self.coding == 'entropy':
            return None
        if self.coding == 'bitmask' or not self.m:
            return packed_bytes(self.numel, 1)
        return packed_bytes(self.numel // self.m, rank_bits(self.n, self.m))

    def fixed_code_bytes(self) -> int | None:
        """Length of the codes, or of the values at full precision; None as for the index."""
        if self.bits is None:
            return self.kept * FLOAT_BYTES[self.dtype]
        return None if self.coding == 'entropy' else packed_bytes(self.kept, self.bits)

    def to_json(self, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The header's entry, without what equals the header's defaults, or else the format's."""
        entry: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != (defaults or {}).get(field.name, field.default):
                entry[field.name] = value
        entry['shape'] = list(self.shape)
        if self.input is not None:
            entry['input'] = list(astuple(self.input))
        if self.inputs:
            entry['inputs'] = [list(astuple(quantizer)) for quantizer in self.inputs]
        return entry

    @classmethod
    def from_json(cls, entry: Any, payload_bytes: int) -> WeightLayout:
        """Reads a header's entry and compares it with the length of what it speaks of.

        Raises:
            PackedFileError: If a field is unknown, missing, of a wrong kind, out of its range, or
                contradicts another one or the payload's length.
        """
        _require(isinstance(entry, Mapping), 'its entry in the header is not an object')
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given = dict(entry)
        unknown = given.keys() - fields.keys()
        _require(not unknown, f'the header has unknown fields {sorted(unknown)[:3]}')
        shape = given.get('shape')
        _require(
            isinstance(shape, list)
            and len(shape) <= MAX_AXES
            and all(_is_int(size, 0, 2**40) for size in shape),
            f'its shape {shape!r:.80} is impossible',
        )
        given['shape'] = tuple(shape)  # type: ignore[arg-type]
        given['input'] = _input_quantizer(given.get('input'))
        several = given.get('inputs', [])
        _require(
            isinstance(several, list) and len(several) <= MAX_INPUTS,
            f'its activation quantizers are {several!r:.80}',
        )
        given['inputs'] = tuple(filter(None, map(_input_quantizer, several)))
        for name, kinds in _KINDS.items():
            if name in given:
                value = given[name]
                allowed = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
                _require(allowed, f'its {name} is {value!r}')
            else:
                _require(
                    fields[name].default is not dataclasses.MISSING, f'the header lacks its {name}'
                )
        layout = cls(**given)
        layout._check_fields()
        layout._check_lengths(payload_bytes)
        return layout

    def _check_fields(self) -> None:
        _require(self.coding in CODINGS, f'its coding {self.coding!r} is unknown')
        _require(self.dtype in FLOAT_BYTES, f'its dtype {self.dtype!r} is unknown')
        _require(self.step in ('channel', 'tensor'), f'its step {self.step!r} is unknown')
        _require(self.step_dtype in FLOAT_BYTES, f'its step_dtype {self.step_dtype!r} is unknown')
        for axis in (self.axis, self.output_axis):
            _require(0 <= axis < len(self.shape), f'its axis {axis} is none of {self.shape}')
        _require(0 <= self.kept <= self.numel, f'it keeps {self.kept} of {self.numel} weights')
        grouped = 1 <= self.n < self.m <= MAX_GROUP and self.shape[self.axis] % self.m == 0
        fits = grouped and self.kept == self.numel // self.m * self.n
        _require(
            fits or self.n == self.m == 0,
            f'groups {self.n}:{self.m} along axis {self.axis} of {self.shape} cannot keep'
            f' {self.kept} weights',
        )
        if self.bits is not None:
            _require(2 <= self.bits <= MAX_BITS, f'its bits are {self.bits}')
            low, high = self.qn, self.qp
            _require(
                -128 <= low < high <= 127 and (high - low).bit_length() == self.bits,
                f'codes from {low} to {high} are not of {self.bits} bits',
            )
            _require(abs(self.offset) <= 1, f'its offset is {self.offset!r}')

    def _check_lengths(self, payload_bytes: int) -> None:
        code_bytes = payload_bytes - self.step_bytes - self.index_bytes
        _require(
            self.index_bytes >= 0 and code_bytes >= 0,
            f'{payload_bytes} bytes cannot hold {self.step_bytes} of steps and {self.index_bytes}'
            ' of index',
        )
        for what, count, given, wanted in (
            ('index', self.numel, self.index_bytes, self.fixed_index_bytes()),
            ('codes', self.kept, code_bytes, self.fixed_code_bytes()),
        ):
            # What is decoded is bounded by what is there; the sparsest index, of 1:32, takes 5 bits
            # for 32 weights.
            bounded = wanted is None and count <= MOST_SYMBOLS_A_BYTE * given
            fits = bounded or given == wanted
            _require(fits, f'{given} bytes cannot be the {what} of a weight of shape {self.shape}')


def shared_values(layouts: Iterable[WeightLayout]) -> dict[str, Any]:
    """The commonest value of each shared field: the header's ``layer_defaults``."""
    layouts = list(layouts)
    return {
        name: Counter(getattr(layout, name) for layout in layouts).most_common(1)[0][0]
        for name in SHARED_FIELDS
    }


_KINDS: dict[str, Any] = {
    'axis': int,
    'output_axis': int,
    'kept': int,
    'coding': str,
    'dtype': str,
    'pattern': (str, type(None)),
    'n': int,
    'm': int,
    'bits': (int, type(None)),
    'codes': str,
    'qn': int,
    'qp': int,
    'offset': (int, float),
    'step': str,
    'step_dtype': str,
    'index_bytes': int,
    'gradient': str,
    'order': str,
    'note': str,
    'held': bool,
    'key': (str, type(None)),
    'standardized': bool,
}


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise PackedFileError(problem)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _input_quantizer(given: Any) -> InputQuantizer | None:
    if given is None:
        return None
    fits = isinstance(given, list) and len(given) == 3 and _is_int(given[0], 2, MAX_BITS)
    fits = fits and given[1] in (None, True, False)
    fits = fits and isinstance(given[2], (int, float)) and 0 < given[2] < LARGEST_STEP
    _require(fits, f'its activation quantizer is {given!r:.80}')
    return InputQuantizer(given[0], given[1], float(given[2]))
