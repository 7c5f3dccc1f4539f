"""The packed file: codecs, container, writer, and a reader for numpy and safetensors alone."""

from typing import TYPE_CHECKING, Any

from slope_mm.errors import PackedFileError
from slope_mm.packing.reader import PackedFile, PackedWeights, read_packed

if TYPE_CHECKING:
    from slope_mm.packing.loader import load_packed, packed_state_dict
    from slope_mm.packing.writer import save_packed

__all__ = [
    'PackedFile',
    'PackedFileError',
    'PackedWeights',
    'load_packed',
    'packed_state_dict',
    'read_packed',
    'save_packed',
]


def __getattr__(name: str) -> Any:
    # These need torch, which reading does not.
    if name in ('load_packed', 'packed_state_dict'):
        from slope_mm.packing import loader

        return getattr(loader, name)
    if name == 'save_packed':
        from slope_mm.packing.writer import save_packed

        return save_packed
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
