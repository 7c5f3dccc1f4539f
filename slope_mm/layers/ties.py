"""Parameters that several modules share, of which a compressed layer makes a weight of its own."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import Projection


class Tie(NamedTuple):
    """One parameter in several modules.

    Attributes:
        keys: Its state-dict keys, one a module.
        owners: The modules and its name in each.
    """

    keys: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]

    def part(self) -> None:
        """Gives each module a copy of its own."""
        for module, name in self.owners:
            whole = module._parameters[name]
            assert whole is not None
            own = nn.Parameter(whole.detach().clone(), requires_grad=whole.requires_grad)
            module._parameters[name] = own

    def join(self) -> bool:
        """Makes equal copies one parameter again; returns whether they were equal."""
        values = [module._parameters[name] for module, name in self.owners]
        if not all(_equal(values[0], value) for value in values[1:]):
            return False
        for module, name in self.owners[1:]:
            module._parameters[name] = values[0]
        return True


def compressed_ties(model: nn.Module) -> list[Tie]:
    """The tied parameters of which a compressed layer of the model is an owner."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = f'{prefix}.{name}' if prefix else name
                places.setdefault(id(parameter), []).append((key, module, name))
    return [
        Tie(tuple(key for key, _, _ in found), tuple((m, name) for _, m, name in found))
        for found in places.values()
        if len(found) > 1 and any(_compresses(module, name) for _, module, name in found)
    ]


def _compresses(module: nn.Module, name: str) -> bool:
    if isinstance(module, CompressedLayer):
        return name == 'weight'
    return any(
        isinstance(child, Projection) and child.parameter == name for child in module.children()
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and bool((a == b).all())
