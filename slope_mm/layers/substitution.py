"""Lets a stock forward run with other weights than the parameters of its modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.layers.activation import kept_as_recipe
from slope_mm.layers.base import CompressedLayer
from slope_mm.ops.tracing import is_compiling

_IN_USE = threading.RLock()


def alone() -> AbstractContextManager[Any]:
    """Scope of a forward that uses :func:`with_tensors`, from before it reads a weight to its end.

    Attributes are the whole process's. Another thread's would be taken for the latent weight here,
    and the latent weight for the compressed one when that thread took its own back; so one thread
    at a time is in such a scope.
    """
    return nullcontext() if is_compiling() else _IN_USE


def as_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that asks for gradients if the parameter in whose place it stands does.

    Without a graph nothing follows from it, but torch chooses between two matrix products by it,
    and they differ in the last bit.
    """
    if tensor.requires_grad or not parameter.requires_grad or torch.is_grad_enabled():
        return tensor
    return tensor.detach().requires_grad_()


@contextmanager
def with_tensors(*places: tuple[nn.Module, str, Tensor | None]) -> Iterator[None]:
    """Scope in which attributes of modules read as other tensors.

    An instance's own attributes are looked up before its parameters, which therefore stay where
    they are, for the optimizer as for a state dict.

    Args:
        *places: Module, name of its parameter, and what it reads as.
    """
    with alone():
        try:
            for module, name, tensor in places:
                stock = module._parameters[name]
                if tensor is not None and stock is not None:
                    tensor = as_parameter(tensor, stock)
                module.__dict__[name] = tensor
            yield
        finally:
            for module, name, _ in places:
                module.__dict__.pop(name, None)


class CompressedOperator(CompressedLayer):
    """Any layer of one input whose stock forward reads ``self.weight``."""

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        with alone():
            x, w = self.quantized_input(input), self.compressed_weight()
            with kept_as_recipe(x), with_tensors((self, 'weight', w)):
                return super().forward(x, *args, **kwargs)
