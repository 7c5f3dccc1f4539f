"""Modules that use weights without the forward of a layer that owns them.

``nn.MultiheadAttention`` holds its projections as bare parameters and reads the weight of a layer
whose forward it never calls; TOOD's task decomposition and the fast path of
``nn.TransformerEncoderLayer`` read the weights of layers below them. Such a module's class is
swapped too, for one that hands its stock forward the compressed weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.state import shape_in


class BareWeight(NamedTuple):
    """A parameter that is a layer's weight, though no layer owns it.

    Attributes:
        parameter: Its name in the module.
        kind: What compresses it.
    """

    parameter: str
    kind: type[Projection]


class Projection(CompressedLayer):
    """A bare parameter of another module as a compressed linear layer.

    It is a child of the module, under the parameter's name without ``_weight``, and owns what
    compression adds; the parameter stays where it was, under its stock key.
    """

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        super().__init__()
        # Within a tuple, or the owner would become a child of its child.
        self._owner = (owner,)
        self.parameter = parameter
        self.coming_shape: tuple[int, ...] | None = None
        self.train(owner.training)

    @property
    def owner(self) -> nn.Module:
        """The module that the parameter belongs to."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The owner's parameter."""
        return getattr(self.owner, self.parameter)

    def leave(self) -> None:
        """Takes the layer out of its owner, who keeps the parameter."""
        for name, child in list(self.owner._modules.items()):
            if child is self:
                del self.owner._modules[name]

    def _coming_shape(
        self, state_dict: Mapping[str, object], prefix: str
    ) -> tuple[int, ...] | None:
        # A child is not shown the keys of its owner, who says so instead.
        return self.coming_shape


class ThreeInputs(Projection):
    """Query, key and value projection in one matrix, ``[3 E, E]``: an input of its own for each."""

    inputs = 3


class Composite(nn.Module):
    """Mixin of a module that uses weights directly.

    Class attributes:
        baked_type: Class of the baked module, if not the stock one.
    """

    baked_type: type[nn.Module] | None = None

    @staticmethod
    def bare_weights(module: nn.Module) -> dict[str, BareWeight]:
        """Which of a (stock or swapped) module's own parameters are weights, by layer name."""
        return {}

    @staticmethod
    def concerned(module: nn.Module) -> bool:
        """Whether a stock module has to be swapped: here, if anything below it is compressed."""
        return any(isinstance(below, CompressedLayer) for below in module.modules())

    @staticmethod
    def uncalled(module: nn.Module) -> list[nn.Module]:
        """Layers below a (stock or swapped) module whose forward does not count their products."""
        return []

    @staticmethod
    def products(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> list[tuple[str, int]]:
        """What one call of a (stock or swapped) module multiplies without a layer's forward.

        Args:
            module: The module.
            args: What it got.
            kwargs: What it got by name.
            output: What it gave.

        Returns:
            Name of each weight's layer below the module, and its multiply-accumulates.
        """
        return []

    def used_layers(self) -> list[CompressedLayer]:
        """The compressed layers whose weight is used without their forward."""
        return []

    def settle(self) -> None:
        """Bakes layers that depend on each other; what is left is baked one by one."""

    def keep_quantizers(self) -> None:
        """Puts stock hooks in place of the input quantizers of those layers (they are baked)."""

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, *args: object
    ) -> None:
        for child in self.children():
            if isinstance(child, Projection):
                child.coming_shape = shape_in(state_dict, prefix + child.parameter)
        super()._load_from_state_dict(state_dict, prefix, *args)
