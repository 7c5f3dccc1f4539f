"""The errors that slope_mm raises for a user's mistake: one clear sentence each.

Every message says what was wrong, where, and what to do. Classes that replace a builtin error at
the same place (a bad value, a missing file) also inherit from it, so that existing handlers work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlopeError(Exception):
    """Base class of everything that slope_mm refuses."""


class RecipeError(SlopeError, ValueError):
    """A recipe or one of its rules is invalid, or does not fit the model."""


class TensorError(SlopeError, ValueError):
    """A tensor cannot be compressed: NaN, infinity, or a shape that the pattern does not divide."""


class CheckpointError(SlopeError, RuntimeError):
    """A checkpoint cannot be read safely, or belongs to another model or recipe."""


class DataError(SlopeError, RuntimeError):
    """A data set is missing, incomplete, or other than asked for."""


class StorageError(SlopeError, OSError):
    """A file cannot be written: the disk is full or read-only, or a right is missing."""


class ConfigError(SlopeError, ValueError):
    """A config cannot be run as it is."""


class PackedFileError(SlopeError, RuntimeError):
    """A packed file is damaged, is of another version, lies about itself, or cannot be written."""


class ExportError(SlopeError, RuntimeError):
    """A model cannot be exported, or what was exported does not compute what was trained."""


class EnvironmentProblem(SlopeError, ImportError):
    """mmengine, mmcv or mmdet is missing or unusable."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Returns ``"; nearest: 'a', 'b'"`` for the known names closest to ``word``, or ``''``."""
    names = list(dict.fromkeys(known))
    found = difflib.get_close_matches(word, names, n=count, cutoff=0.4)
    if not found:
        # A dotted name is often right in its last part alone.
        tails = {name.rsplit('.', 1)[-1]: name for name in names}
        tail = word.rsplit('.', 1)[-1]
        found = [tails[t] for t in difflib.get_close_matches(tail, tails, n=count, cutoff=0.4)]
    return '; nearest: ' + ', '.join(repr(name) for name in found) if found else ''
