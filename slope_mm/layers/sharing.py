"""Within a scope a compressed weight is computed once, however often the layer runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slope_mm.ops.compress import Compress
from slope_mm.ops.compress_many import bundles, compress_many

if TYPE_CHECKING:
    from slope_mm.layers.base import CompressedLayer


def is_recomputed() -> bool:
    """Whether what is computed now runs once more in the backward pass (non-reentrant checkpoints).

    Such a part has to save as many tensors then as it does now. Torch 2.1 does not tell.
    """
    hooks_of = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    hooks = None if hooks_of is None else hooks_of(True)
    return hooks is not None and hooks[0].__module__ == 'torch.utils.checkpoint'


class SharedWeight:
    """A compressed weight, and what it may be used for.

    Where fused kernels make it, holding it costs more than making it again. So a layer that runs
    once a step may let go of it: then the weight lives as long as the operator that consumes it,
    and that operator's backward compresses once more.

    Attributes:
        powers: The sums that regularizers need.
        sums: Whether all of them are there.
    """

    def __init__(
        self, compressed: Tensor, powers: Tensor, sums: bool, let_go: bool = False
    ) -> None:
        self.powers, self.sums = powers, sums
        self._has_graph = compressed.requires_grad
        self._weight = weakref.ref(compressed)
        node: Any = compressed.grad_fn
        again = let_go and getattr(node, 'kernels', None) is not None
        if again:
            Compress.let_go(node)
        self._held = None if again else compressed

    def serves(self, wants_grad: bool, sums: bool) -> bool:
        """Whether the sums that are asked for, or else the weight, are there with their graph."""
        there = self.sums if sums else self._weight() is not None
        return there and (self._has_graph or not wants_grad)

    def outputs(self, wants_grad: bool) -> tuple[Tensor | None, Tensor]:
        """Compressed weight (None where it was let go) and sums, with their graph or without."""
        compressed = self._weight()
        if wants_grad:
            return compressed, self.powers
        return None if compressed is None else compressed.detach(), self.powers.detach()


class SharedWeightScope(nn.Module):
    """The part of a compressed layer that keeps its compressed weight while a scope is open."""

    _shared: SharedWeight | None
    _sharing: bool
    _sums: bool
    _let_go: bool

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

    def begin_sharing(
        self,
        sums: bool = True,
        keep: bool = False,
        let_go: bool = False,
        room: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Opens a sharing scope.

        Args:
            sums: Whether :meth:`weight_powers` will be asked for in training.
            keep: Go on with what an earlier scope kept; it has to be right still.
            let_go: Whether the weight need not be held between its uses.
            room: Where inputs are quantized to that the layer's operator alone sees, without
                gradients (:class:`~slope_mm.layers.room.InputRoom`).
        """
        # Past nn.Module's __setattr__, which looks at what each value is: ten times the price.
        state = self.__dict__
        if not keep:
            state['_shared'] = None
        state['_sharing'], state['_sums'], state['_let_go'] = True, sums, let_go
        state['_room'] = room

    def end_sharing(self, keep: bool = False) -> None:
        """Closes the sharing scope and lets go of the compressed weight and its graph.

        Args:
            keep: Hold on to the weight for a scope that begins with ``keep``.
        """
        state = self.__dict__
        if not keep:
            state['_shared'] = None
        state['_sharing'], state['_room'] = False, None


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


def compress_together(layers: Iterable[CompressedLayer]) -> None:
    """Compresses at once what layers with an open scope will use in it, where that is faster.

    On CUDA with fused kernels (:mod:`slope_mm.ops.compress_many`); elsewhere, and for layers of
    other kinds, every layer compresses its own weight when it runs.
    """
    found = [(layer, one) for layer in layers if (one := layer.one_of_many()) is not None]
    for trained in (True, False):
        own = [pair for pair in found if pair[1].weight.requires_grad == trained]
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            for bundle in bundles([one for _, one in own]):
                pairs = [own[index] for index in bundle]
                compressed, powers = compress_many([one for _, one in pairs])
                for (layer, _), weight, sums in zip(pairs, compressed, powers, strict=True):
                    layer.__dict__['_shared'] = SharedWeight(weight, sums, sums=True)
