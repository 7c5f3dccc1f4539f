"""Do sparsity and quantization add up? Weight errors of each alone and of both, layer by layer.

arXiv 2405.20935 calls two compressions orthogonal where the error of both together is at most the
sum of their single errors: ``|w - q(S(w))| <= |w - S(w)| + |w - q(w)|``.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers, convert


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors ``|w - compressed| / |w|`` of one layer.

    Attributes:
        name: Qualified name.
        sparsity: Pattern.
        bits: Weight bits.
        sparse: Of sparsity alone.
        quantized: Of quantization alone.
        s_then_q: Of both, sparsity first.
        q_then_s: Of both, quantization first.
    """

    name: str
    sparsity: str
    bits: int
    sparse: float
    quantized: float
    s_then_q: float
    q_then_s: float

    @property
    def excess(self) -> float:
        """The combined error (sparsity first) over the sum of both; above 1: not orthogonal."""
        return self.s_then_q / (self.sparse + self.quantized)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def layer_errors(dense: nn.Module, sparsity: str, bits: int) -> list[LayerErrors]:
    """Compresses copies of a dense model four ways and measures every layer's weight.

    Steps are those of the search (see ``docs/method.md``), each way its own.

    Args:
        dense: A stock model with trained weights; it stays as it is.
        sparsity: Pattern, such as ``'2:4'``.
        bits: Weight bits.

    Returns:
        One item per layer that is both sparse and quantized.
    """
    both: dict[str, Any] = {'weight': {'sparsity': sparsity, 'bits': bits}}
    ways: dict[str, dict[str, Any]] = {
        'sparse': {'weight': {'sparsity': sparsity, 'bits': None}},
        'quantized': {'weight': {'sparsity': None, 'bits': bits}},
        's_then_q': both,
        'q_then_s': {**both, 'order': 'q_then_s'},
    }
    errors = {way: _errors(dense, recipe) for way, recipe in ways.items()}
    found = []
    for name, combined in errors['s_then_q'].items():
        if all(name in of_way for of_way in errors.values()):
            rest = {way: of_way[name] for way, of_way in errors.items() if way != 's_then_q'}
            found.append(LayerErrors(name, sparsity, bits, s_then_q=combined, **rest))
    return found


def _errors(dense: nn.Module, recipe: dict[str, Any]) -> dict[str, float]:
    model = copy.deepcopy(dense)
    convert(model, recipe)
    found = {}
    for name, layer in compressed_layers(model).items():
        edge = layer.slope_spec.note
        if layer.changes_weight and not edge:
            latent: Tensor = layer.latent_weight().detach()
            difference = latent - layer.compressed_weight()
            found[name] = float(difference.norm() / latent.norm().clamp_min(1e-30))
    return found
