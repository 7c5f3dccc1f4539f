"""Within a scope a compressed weight is computed once, however often the layer runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class SharedWeight(NamedTuple):
    """A compressed weight, and what it may be used for."""

    compressed: Tensor
    powers: Tensor
    sums: bool

    def serves(self, wants_grad: bool, sums: bool) -> bool:
        """Whether it has the graph and the sums that are asked for."""
        return (self.compressed.requires_grad or not wants_grad) and (self.sums or not sums)

    def outputs(self, wants_grad: bool) -> tuple[Tensor, Tensor]:
        """Compressed weight and sums, with their graph or without."""
        if wants_grad:
            return self.compressed, self.powers
        return self.compressed.detach(), self.powers.detach()


class SharedWeightScope(nn.Module):
    """The part of a compressed layer that keeps its compressed weight while a scope is open."""

    _shared: SharedWeight | None
    _sharing: bool
    _sums: bool

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Scope in which the compressed weight is computed once. W must not change inside."""
        self.begin_sharing()
        try:
            yield
        finally:
            self.end_sharing()

    @property
    def sharing(self) -> bool:
        """Whether a sharing scope is open."""
        return self._sharing

    def begin_sharing(self, sums: bool = True, keep: bool = False) -> None:
        """Opens a sharing scope.

        Args:
            sums: Whether :meth:`weight_powers` will be asked for in training.
            keep: Go on with what an earlier scope kept; it has to be right still.
        """
        if not keep:
            self._shared = None
        self._sharing, self._sums = True, sums

    def end_sharing(self, keep: bool = False) -> None:
        """Closes the sharing scope and lets go of the compressed weight and its graph.

        Args:
            keep: Hold on to the weight for a scope that begins with ``keep``.
        """
        if not keep:
            self._shared = None
        self._sharing = False


@contextmanager
def shared_weights(layers: Iterable[SharedWeightScope]) -> Iterator[None]:
    """Scope in which every layer's compressed weight is computed once."""
    layers = list(layers)
    for layer in layers:
        layer.begin_sharing()
    try:
        yield
    finally:
        for layer in layers:
            layer.end_sharing()
