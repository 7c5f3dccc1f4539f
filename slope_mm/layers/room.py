"""Memory that quantized inputs take turns in, outside training."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class InputRoom:
    """Where layers put a quantized input that lives as long as one call of their operator.

    Fresh memory costs more than quantizing does (docs/performance.md), and with gradients off
    nobody keeps the input: each layer writes over what the one before was given. The room grows to
    the largest input; every thread has its own. A GPU's allocator has done the same all along, so
    other devices get new tensors.
    """

    def __init__(self) -> None:
        self._bytes: dict[int, Tensor] = {}

    def __call__(self, like: Tensor) -> Tensor:
        """Memory for a tensor like a dense one: its shape, strides and dtype, any content."""
        if like.device.type != 'cpu':
            return torch.empty_like(like)
        thread = threading.get_ident()
        room = self._bytes.get(thread)
        if room is None or room.numel() < like.nbytes:
            # The smaller one goes before the larger one comes.
            self._bytes[thread] = room = torch.empty(0, dtype=torch.uint8)
            # What inference mode makes could not be written to outside.
            with torch.inference_mode(False):
                self._bytes[thread] = room = torch.empty(like.nbytes, dtype=torch.uint8)
        return room[: like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())

    def release(self) -> None:
        """Gives the memory back."""
        self._bytes.clear()
