"""Short names of the weights in checkpoints."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import torch

from slope_mm.engine.checkpoint import load_checkpoint_file


def weights_digest(checkpoint: str | os.PathLike[str]) -> str:
    """Names the weights in a checkpoint, whatever else is in the file.

    Args:
        checkpoint: A Runner's checkpoint or a plain state dict.

    Returns:
        The first 12 hex digits of the SHA-256 of all tensors of the state dict, buffers too: name,
        dtype, shape and bytes, in the order of their names.

    Raises:
        SlopeError: If there is no such file or it is no checkpoint.
    """
    loaded = load_checkpoint_file(checkpoint)
    state = loaded.get('state_dict', loaded)
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        if isinstance(tensor, torch.Tensor):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            content = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
            digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:12]


def digest_now(checkpoint: str) -> str:
    """The digest of a file as it is now; read once, however many trials ask."""
    file = Path(checkpoint).expanduser()
    state = file.stat()
    return _digest_of(str(file), state.st_mtime_ns, state.st_size)


@functools.lru_cache
def _digest_of(path: str, changed_ns: int, size: int) -> str:
    return weights_digest(path)
