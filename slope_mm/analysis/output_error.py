"""How far the outputs of compressed layers are from those of their dense twins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.layers.sharing import shared_weights


@dataclass(frozen=True)
class OutputError:
    """Squared sums over everything that a layer gave.

    Attributes:
        noise: Of the differences.
        power: Of the dense layer's outputs.
    """

    noise: float = 0.0
    power: float = 0.0

    @property
    def relative(self) -> float:
        """``noise / power``; 0 where the dense layer gave zeros alone and so did the other."""
        if self.noise == 0:
            return 0.0
        return self.noise / self.power if self.power else math.inf


@torch.no_grad()
def output_errors(
    dense: nn.Module,
    compressed: nn.Module,
    forward: Callable[[], Any],
    names: Iterable[str] | None = None,
) -> dict[str, OutputError]:
    """Compares every compressed layer with the dense one, on the inputs that the dense one gets.

    Errors of earlier layers are not in it: each layer is judged alone.

    Args:
        dense: The stock model.
        compressed: A compressed copy of it; uncalibrated inputs pass unquantized.
        forward: Runs ``dense`` on some images.
        names: The layers to compare; None for all that are compressed.

    Returns:
        One entry per layer that ran, in the order in which they ran first. Attention's projections
        are no modules of the dense model and have none.
    """
    twins = compressed_layers(compressed)
    if names is not None:
        twins = {name: twins[name] for name in names}
    found: dict[str, OutputError] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            there, here = _tensor(output), _tensor(twins[name](*args, **kwargs))
            before = found.get(name, OutputError())
            found[name] = OutputError(
                before.noise + float((here - there).double().square().sum()),
                before.power + float(there.double().square().sum()),
            )

        return hook

    modules = dict(dense.named_modules())
    handles = [
        modules[name].register_forward_hook(compare(name), with_kwargs=True)
        for name in twins
        if name in modules
    ]
    modes = [(module, module.training) for module in compressed.modules()]
    compressed.eval()
    try:
        with shared_weights(twins.values()):
            forward()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return found


def _tensor(output: Any) -> Tensor:
    """What a layer gave; the first of several tensors, as attention gives."""
    return output[0] if isinstance(output, (tuple, list)) else output
