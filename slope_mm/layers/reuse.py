"""Outside training a compressed weight is computed once and used again while W stays what it is.

The forward's scope also lends the memory that quantized inputs lie in
(:mod:`slope_mm.layers.room`); training takes both away.

Whether W stayed what it is cannot be told from version counters: an EMA swap writes through
``.data``, which they do not see. So the values themselves are looked at, once per forward of the
whole model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.room import InputRoom
from slope_mm.ops.tracing import is_compiling

_CHUNK = 65536


@functools.cache
def _noise(device: torch.device) -> Tensor:
    return torch.randn(_CHUNK, generator=torch.Generator().manual_seed(0)).to(device)


def _projections(x: Tensor) -> list[Tensor]:
    """Random projections of a tensor's values, a chunk each: another value, order or sign shows."""
    flat = x.detach().reshape(-1).float()
    noise, whole = _noise(x.device), flat.numel() // _CHUNK * _CHUNK
    found = [torch.mv(flat[:whole].view(-1, _CHUNK), noise)] if whole else []
    if whole < flat.numel():
        rest = flat[whole:]
        found.append(torch.dot(rest, noise[: rest.numel()]).reshape(1))
    return found


def _projections_at_once(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`_projections` of tensors on a GPU, where a small call takes longer than a copy.

    What fills no chunk is compared itself: beside other tensors' values in a chunk a small change
    might be lost.
    """
    found, chunks = [], []
    for x in tensors:
        flat = x.detach().reshape(-1).float()
        whole = flat.numel() // _CHUNK * _CHUNK
        if whole:
            chunks.append(flat[:whole])
        if whole < flat.numel():
            found.append(flat[whole:])
    if chunks:
        found.append(torch.mv(torch.cat(chunks).view(-1, _CHUNK), _noise(chunks[0].device)))
    return found


@torch.no_grad()
def fingerprint(layers: list[CompressedLayer]) -> Tensor:
    """What all compressed weights depend on, as a vector to compare: W, steps and held masks.

    Reads every weight once, which takes about a twentieth of the time of compressing it.
    """
    sources = [x for layer in layers for x in layer.sources() if x is not None]
    parts = [p for x in sources if not x.is_cuda for p in _projections(x)]
    on_gpu: dict[torch.device, list[Tensor]] = {}
    for x in sources:
        if x.is_cuda:
            on_gpu.setdefault(x.device, []).append(x)
    for tensors in on_gpu.values():
        parts += _projections_at_once(tensors)
    return torch.cat([part.to(parts[0].device) for part in parts])


class WeightReuse:
    """Forward hooks of a converted model: opens and closes the scope of one forward.

    With gradients nothing is reused between two forwards: the training loop decides (see
    ``SlopeOptimWrapper``).
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._kinds: list[Any] = []
        self._open: list[list[CompressedLayer]] = []
        self._room = InputRoom()

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Registers the hooks."""
        reuse = cls()
        model.register_forward_pre_hook(reuse.begin)
        model.register_forward_hook(reuse.end, always_call=True)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Removes the hooks from a model that has them."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, '__self__', None), WeightReuse):
                    del hooks[key]

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a forward: keeps the compressed weights if they are still right."""
        if getattr(model, 'slope_in_step', False):
            # A training step's scope; modules need not be looked through.
            self._open.append([])
            self._room.release()
            return
        layers = [m for m in model.modules() if isinstance(m, CompressedLayer) and m.changes_weight]
        # An own scope that is open is that of a forward around this one, which can do without from
        # here on, or of one that was interrupted (by Ctrl-C) and never closes it.
        own = any(self._open)
        if own:
            self._open.clear()
        if is_compiling() or torch.jit.is_tracing() or not layers:
            layers = []
        elif not own and any(layer.sharing for layer in layers):
            # A training step's scope, or another caller's.
            layers = []
        elif torch.is_grad_enabled():
            self._seen = None
            self._room.release()
            for layer in layers:
                layer.end_sharing()
            layers = []
        self._open.append(layers)
        if not layers:
            return
        # The values as float32 say nothing of their dtype.
        now = fingerprint(layers)
        # A tensor of inference mode is of no use outside.
        kinds: list[Any] = [torch.is_inference_mode_enabled()]
        kinds += [(layer.weight.dtype, layer.weight.device) for layer in layers]
        same = self._seen is not None and torch.equal(now, self._seen.to(now.device))
        same = same and kinds == self._kinds
        self._seen, self._kinds = now, kinds
        for layer in layers:
            layer.begin_sharing(keep=same, room=self._room)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward: other callers compute anew."""
        for layer in self._open.pop() if self._open else ():
            layer.end_sharing(keep=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or loaded model starts without: its weights may be others.
        return {'_seen': None, '_kinds': [], '_open': []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _room=InputRoom())
