"""Which weights a model has, by the names that recipes and reports call them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slope_mm.errors import SlopeError
from slope_mm.layers.base import CompressedLayer
from slope_mm.layers.composite import Composite, Projection
from slope_mm.layers.kinds import composite_kind, layer_kind, stock_type

# Parameters that no matrix product or convolution uses: what is looked up or added.
LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
TABLE_NAMES = re.compile(r'(.*_)?(embed(ding)?s?|tokens?|table|bias)(_.*)?')
TABLE = 'a table that is looked up or added, not multiplied'


@dataclass(frozen=True)
class FoundWeight:
    """A parameter that is, or may be, a layer's weight.

    Attributes:
        names: Qualified names of its layer; several where modules are shared. A bare parameter
            ``attn.in_proj_weight`` belongs to the layer ``attn.in_proj``.
        owner: The module that the parameter belongs to.
        parameter: The parameter's name in it.
        kind: What compresses it; None if nothing does.
        layer: What does compress it; None in a dense model.
        obstacle: Why nothing can compress it, or ``''``.
    """

    names: tuple[str, ...]
    owner: nn.Module
    parameter: str = 'weight'
    kind: type[CompressedLayer] | None = None
    layer: CompressedLayer | None = None
    obstacle: str = ''

    @property
    def name(self) -> str:
        """The layer's first name."""
        return self.names[0]

    @property
    def key(self) -> str:
        """The parameter's key in a state dict."""
        bare = self.kind is not None and issubclass(self.kind, Projection)
        owner = self.name.rpartition('.')[0] if bare else self.name
        return f'{owner}.{self.parameter}' if owner else self.parameter

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return getattr(self.owner, self.parameter)

    @property
    def types(self) -> list[str]:
        """Class names that a rule may call it by: its module's and those of its bases."""
        return [cls.__name__ for cls in type(self.owner).__mro__]


def module_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """All names of each module, in the model's order."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def find_weights(model: nn.Module) -> list[FoundWeight]:
    """The weights of a dense or compressed model, each once, in the model's order.

    Raises:
        SlopeError: If a layer is lazy and has not run yet.
    """
    found: list[FoundWeight] = []
    modules = module_names(model)
    _refuse_lazy(modules)
    unheard = _never_called(modules)
    for module, names in modules.items():
        if isinstance(module, Projection):
            continue
        compressed = module if isinstance(module, CompressedLayer) else None
        kind = type(compressed) if compressed is not None else layer_kind(type(module))
        composite = type(module) if isinstance(module, Composite) else composite_kind(type(module))
        bare = composite.bare_weights(module) if composite is not None else {}
        for part, (parameter, part_kind) in bare.items():
            own = tuple(f'{name}.{part}' if name else part for name in names)
            layer = module._modules.get(part)
            known = layer if isinstance(layer, CompressedLayer) else None
            obstacle = _obstacle(module, parameter)
            found.append(FoundWeight(own, module, parameter, part_kind, known, obstacle))
        if kind is not None:
            obstacle = unheard.get(module) or _obstacle(module, 'weight')
            found.append(FoundWeight(names, module, 'weight', kind, compressed, obstacle))
        # A layer norm over [C, 1, 1] has vectors of three axes.
        elif not bare and not isinstance(module, nn.LayerNorm):
            unknown = f'no compressed kind of {stock_type(module).__name__}'
            found += [
                FoundWeight(
                    names, module, key, obstacle=TABLE if is_table(module, key) else unknown
                )
                for key in _several_axes(module)[:1]
            ]
    return found


def _refuse_lazy(modules: dict[nn.Module, tuple[str, ...]]) -> None:
    for module, names in modules.items():
        if any(p is not None and is_lazy(p) for p in module._parameters.values()):
            raise SlopeError(
                f"the {type(module).__name__} '{names[0]}' has no shape yet; run the model once on"
                ' an input, then compress it'
            )


def is_table(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter takes part in no matrix product or convolution."""
    return isinstance(module, LOOKED_UP) or TABLE_NAMES.fullmatch(parameter) is not None


def _several_axes(module: nn.Module) -> list[str]:
    """Parameters of several axes, those that are multiplied first."""
    keys = [key for key, p in module.named_parameters(recurse=False) if p.dim() > 1]
    return sorted(keys, key=lambda key: is_table(module, key))


def _obstacle(module: nn.Module, parameter: str) -> str:
    # Spectral norm and its kin compute the weight anew before every forward.
    return '' if parameter in module._parameters else 'its weight is computed by a hook'


def _never_called(modules: dict[nn.Module, tuple[str, ...]]) -> dict[nn.Module, str]:
    """Layers whose forward an unknown subclass of attention may not call."""
    return {
        layer: f'{type(module).__name__} may use its weight without its forward'
        for module in modules
        if isinstance(module, nn.MultiheadAttention)
        and not isinstance(module, Composite)
        and composite_kind(type(module)) is None
        for layer in module.modules()
        if layer is not module
    }
