"""Entropy-coded symbols: an asymmetric numeral system (ANS), in chunks that are coded alone.

The coder is that of the ``constriction`` library (``stream.stack.AnsCoder``: 32-bit words, a state
of 64 bits, probabilities in units of 2^-24). A stream of ``n`` symbols is

    ceil(n / 8192) x u32    number of words of each chunk
    u32 ...                 the words of all chunks, one after the other

little-endian. Chunk ``i`` holds symbols ``8192 i`` to ``8192 (i + 1) - 1`` and is decoded like
this, with ``left`` and ``freq`` the start and length of each symbol's interval in ``[0, 2^24)``:

    state = the last two words (the very last is the upper half; 0 where there are fewer)
    repeat: quantile = state mod 2^24;  symbol = the one whose interval holds quantile
            state = (state >> 24) * freq[symbol] + quantile - left[symbol]
            if state < 2^32 and a word is left: state = (state << 32) | the word before

After the last symbol the state is 0 and no word is left. Chunks are independent, so that numpy can
decode them side by side where ``constriction`` is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slope_mm.errors import PackedFileError

CHUNK = 8192
PRECISION = 24
# A stream with its table holds at least 1/8 bit a symbol, so that a file bounds what reading it
# takes. What would need less is stored with a fixed width.
MOST_SYMBOLS_A_BYTE = 64


@dataclass(frozen=True)
class SymbolModel:
    """Probabilities of the symbols ``0 .. len(freq) - 1``, in units of 2^-24; none is zero.

    A uniform model has ``freq = floor(2^24 / size)`` everywhere but at the last symbol, which takes
    the rest.
    """

    freq: NDArray[np.int64]
    uniform: bool = False

    @classmethod
    def evenly(cls, size: int) -> SymbolModel:
        """All of ``size >= 2`` symbols alike."""
        freq = np.full(size, 2**PRECISION // size, np.int64)
        freq[-1] += 2**PRECISION - freq.sum()
        return cls(freq, uniform=True)

    @classmethod
    def of_counts(cls, counts: NDArray[np.int64]) -> SymbolModel:
        """The nearest model to how often each symbol occurs."""
        size, total = len(counts), max(int(counts.sum()), 1)
        room = 2**PRECISION - size
        freq = counts.astype(np.int64) * room // total + 1
        freq[np.argmax(counts)] += 2**PRECISION - freq.sum()
        return cls(freq)

    @classmethod
    def from_table(cls, table: NDArray[np.uint32]) -> SymbolModel:
        """The model of a file's table.

        Raises:
            PackedFileError: If a symbol has no probability or they do not sum to one.
        """
        freq = table.astype(np.int64)
        if freq.min(initial=1) < 1 or freq.sum() != 2**PRECISION:
            raise PackedFileError('its table of probabilities does not sum to one')
        return cls(freq)

    def table(self) -> NDArray[np.uint32]:
        """What :meth:`from_table` reads."""
        return self.freq.astype('<u4')

    def for_constriction(self, constriction: Any) -> Any:
        """The library's model with these very probabilities."""
        if self.uniform:
            return constriction.stream.model.Uniform(len(self.freq))
        # It gives each symbol one unit beforehand and shares the rest in these proportions.
        return constriction.stream.model.Categorical(
            (self.freq - 1).astype(np.float64), perfect=False
        )


def _constriction() -> Any | None:
    try:
        import constriction
    except ImportError:
        return None
    return constriction


def encode_stream(symbols: NDArray[np.unsignedinteger], model: SymbolModel) -> bytes:
    """Encodes symbols.

    Raises:
        PackedFileError: If ``constriction`` is not installed.
    """
    constriction = _constriction()
    if constriction is None:
        raise PackedFileError(
            "entropy coding needs the package 'constriction' to write: python -m pip install"
            " constriction, or write with coding='enumerative'"
        )
    library_model = model.for_constriction(constriction)
    counts, words = [], []
    for start in range(0, symbols.size, CHUNK):
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols[start : start + CHUNK].astype(np.int32), library_model)
        compressed = coder.get_compressed()
        counts.append(compressed.size)
        words.append(compressed.astype('<u4'))
    return b''.join([np.array(counts, '<u4').tobytes(), *(chunk.tobytes() for chunk in words)])


def decode_stream(
    data: NDArray[np.uint8], count: int, model: SymbolModel
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint8]]:
    """Decodes symbols from the beginning of ``data``.

    Returns:
        The symbols (uint8 where they fit, else uint32), and the bytes behind the stream.

    Raises:
        PackedFileError: If the data end early or do not fit the model.
    """
    chunks = -(-count // CHUNK)
    # MOST_SYMBOLS_A_BYTE bounds stream and table together, and was asked of the layout.
    if data.size < 4 * chunks:
        raise PackedFileError(f'{data.size} bytes cannot hold {count} entropy-coded symbols')
    counts = data[: 4 * chunks].view('<u4').astype(np.int64)
    end = 4 * chunks + 4 * int(counts.sum())
    if end > data.size:
        raise PackedFileError('its entropy-coded data end early')
    words = data[4 * chunks : end].view('<u4')
    decode = _decode_numpy if _constriction() is None else _decode_constriction
    small = len(model.freq) <= 256
    symbols = np.empty(count, np.uint8 if small else np.uint32)
    if count:
        decode(words, counts, model, symbols)
    return symbols, data[end:]


def _decode_constriction(
    words: NDArray[np.uint32],
    counts: NDArray[np.int64],
    model: SymbolModel,
    symbols: NDArray[np.unsignedinteger],
) -> None:
    constriction: Any = _constriction()
    library_model = model.for_constriction(constriction)
    ends = np.cumsum(counts)
    for chunk, (end, size) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        part = symbols[chunk * CHUNK : (chunk + 1) * CHUNK]
        try:
            coder = constriction.stream.stack.AnsCoder(words[end - size : end].astype(np.uint32))
        except ValueError:
            raise PackedFileError('its entropy-coded data end in a zero word') from None
        part[:] = coder.decode(library_model, part.size)
        if not coder.is_empty():
            raise PackedFileError('its entropy-coded data hold more than its symbols')


def _decode_numpy(
    words: NDArray[np.uint32],
    counts: NDArray[np.int64],
    model: SymbolModel,
    symbols: NDArray[np.unsignedinteger],
) -> None:
    """All chunks side by side, one symbol of each at a time."""
    left = np.cumsum(model.freq) - model.freq
    ends = np.cumsum(counts)
    starts = ends - counts
    # The word number `at` of the stream has position `at` here.
    padded = np.concatenate([np.zeros(1, np.uint64), words.astype(np.uint64)])
    if np.any((counts > 0) & (padded[ends] == 0)):
        raise PackedFileError('its entropy-coded data end in a zero word')
    at = ends
    state = np.where(counts > 0, padded[at], 0) << np.uint64(32)
    state |= np.where(counts > 1, padded[np.maximum(at - 1, 0)], 0)
    state = np.where(counts == 1, state >> np.uint64(32), state)
    at = np.maximum(at - 2, starts)
    freq, low = model.freq.astype(np.uint64), left.astype(np.uint64)
    quantiles = np.uint64(2**PRECISION - 1)
    last = symbols.size - CHUNK * (len(counts) - 1)
    for step in range(min(CHUNK, symbols.size)):
        if step == last and len(counts) > 1:
            _require_finished(state[-1:], at[-1:], starts[-1:])
            state, at, starts = state[:-1], at[:-1], starts[:-1]
        quantile = state & quantiles
        symbol = np.searchsorted(left, quantile.astype(np.int64), 'right') - 1
        symbols[step : step + CHUNK * len(state) : CHUNK] = symbol
        state = (state >> np.uint64(PRECISION)) * freq[symbol] + quantile - low[symbol]
        refill = (state < np.uint64(2**32)) & (at > starts)
        state = np.where(refill, (state << np.uint64(32)) | padded[at], state)
        at = at - refill
    _require_finished(state, at, starts)


def _require_finished(
    state: NDArray[np.uint64], at: NDArray[np.int64], starts: NDArray[np.int64]
) -> None:
    if np.any(state) or np.any(at != starts):
        raise PackedFileError('its entropy-coded data hold more than its symbols')
