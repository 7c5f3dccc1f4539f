"""Folds batch norms into the compressed layers before them, with the codes as they were.

In evaluation ``y = gamma (W x + c - mean) / sigma + beta`` with ``sigma = sqrt(var + eps)``. The
factor ``gamma / sigma`` of an output channel belongs to its step, whose sign to the codes: where
the code set is closed under negation (``symmetric``, ``odd``) they are negated, elsewhere the norm
keeps a weight of -1. What remains of the norm is its bias; the layer's own bias moves into it. The
norm itself stays in the model, as a neutral one, so that the state dict keeps the stock model's
keys.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slope_mm.errors import SlopeError
from slope_mm.layers import CompressedLayer, is_plain
from slope_mm.ops import SMALLEST_STEP, Codes, positive

# Blocks of ResNets (mmdet's and its kin, torchvision's), by class name: conv1 runs before norm1,
# and so on. Other blocks may have the same attributes in another order.
RESNET_PARTS = ('ResNet', 'BasicBlock', 'Bottleneck')


def batch_norm_pairs(model: nn.Module, any_step: bool = False) -> list[tuple[str, str]]:
    """Names of layers and of the batch norms that run right behind them.

    Known are mmcv's ``ConvModule``, ``nn.Sequential`` and the blocks of ResNets. A layer or norm
    that belongs to several modules, or shares a parameter with another one, is left out: what is
    folded into it would be seen there as well.

    Args:
        model: A compressed or plain model.
        any_step: Count layers with one step for all channels too, which cannot hold a factor for
            each themselves.
    """
    names = {module: name for name, module in model.named_modules()}
    pairs = [
        (layer, norm)
        for module in names
        for layer, norm in _pairs_of(module)
        if isinstance(norm, _BatchNorm) and _foldable(layer, norm, any_step)
    ]
    owners = Counter(id(child) for module in names for child in set(module.children()))
    owners += Counter(id(p) for module in names for p in module._parameters.values())
    layers, norms = [p[0] for p in pairs], [p[1] for p in pairs]
    return [
        (names[layer], names[norm])
        for layer, norm in pairs
        if layers.count(layer) == 1
        and norms.count(norm) == 1
        and all(owners[id(part)] == 1 for part in (layer, norm, *_parameters_of(layer, norm)))
    ]


def _parameters_of(*modules: nn.Module) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from module.parameters(recurse=False)


def _pairs_of(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    # Whose forward it is says in which order parts run: a subclass may have another one.
    runs = next(kind for kind in type(module).__mro__ if 'forward' in vars(kind))
    if 'forward' in vars(module):
        return
    if runs is nn.Sequential and isinstance(module, nn.Sequential):
        yield from itertools.pairwise(module)
    elif runs.__name__ == 'ConvModule':
        order = tuple(getattr(module, 'order', ()))
        if order[:2] == ('conv', 'norm') and getattr(module, 'with_norm', False):
            yield module.conv, module.norm  # type: ignore[misc]
    elif runs.__name__ in RESNET_PARTS:
        for number in ('1', '2', '3'):
            layer = getattr(module, f'conv{number}', None)
            norm = getattr(module, f'norm{number}', None) or getattr(module, f'bn{number}', None)
            # Blocks that normalize first have the same names, and the norm above the layer.
            parts = list(module.children())
            if layer in parts and norm in parts and parts.index(layer) < parts.index(norm):
                yield layer, norm


def _foldable(layer: nn.Module, norm: _BatchNorm, any_step: bool) -> bool:
    # What a hook computes (spectral norm and its kin) would be computed over the folded weight.
    if not is_plain(layer) or 'weight' not in layer._parameters:
        return False
    transposed = isinstance(layer, nn.ConvTranspose2d)
    if transposed and layer.groups != 1:
        return False
    step = layer.step if isinstance(layer, CompressedLayer) else None
    if step is not None and step.numel() != norm.num_features and not any_step:
        # One step for all channels cannot take a factor for each.
        return False
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (
        norm.running_var is not None
        and norm.weight is not None
        and weight.shape[1 if transposed else 0] == norm.num_features
        and weight.dtype == torch.float32
    )


@torch.no_grad()
def fold_batch_norms(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Folds every batch norm that runs right behind a convolution or linear layer.

    The model then computes the same in evaluation up to rounding, with the very codes that it was
    trained with (negated where gamma is negative and the code set allows it). Training has to be
    over: a folded norm has no statistics any more.

    Args:
        model: A compressed or plain model.
        inplace: Fold in this model instead of a copy.

    Returns:
        The folded model, in evaluation mode.

    Raises:
        SlopeError: If no norm can be folded.
    """
    if not inplace:
        model = copy.deepcopy(model)
    pairs = batch_norm_pairs(model)
    if not pairs:
        raise SlopeError(
            'no batch norm runs right behind a convolution or linear layer that could take it;'
            ' leave folding out'
        )
    for layer_name, norm_name in pairs:
        norm = model.get_submodule(norm_name)
        _fold(model.get_submodule(layer_name), norm)  # type: ignore[arg-type]
    return model.eval()


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    var: Tensor = norm.running_var  # type: ignore[assignment]
    factor = norm.weight.double() / torch.sqrt(var.double() + norm.eps)
    shift = norm.bias.double() - mean.double() * factor
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if bias is not None:
        shift += bias.double() * factor
        bias.zero_()
    norm.weight.copy_(_scale(layer, factor))
    norm.bias.copy_(shift)
    mean.zero_()
    # So that var + eps is 1.
    var.fill_(1 - norm.eps)


def _scale(layer: nn.Module, factor: Tensor) -> Tensor:
    """Multiplies a layer's output channels; returns what remains for the norm's weight."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    shape = [1] * weight.dim()
    shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0] = -1
    if isinstance(layer, CompressedLayer) and layer.mask is not None and layer.slope_mask is None:
        layer.hold_mask()
    if not isinstance(layer, CompressedLayer) or layer.step is None:
        weight.mul_(factor.reshape(shape))
        return torch.ones_like(factor)
    codes: Codes = layer.slope_spec.weight_codes  # type: ignore[assignment]
    signs = torch.where(factor < 0, -1.0, 1.0)
    remaining = torch.ones_like(signs)
    if codes.qn + codes.offset != -codes.largest:
        # The negative of the smallest level is none.
        signs, remaining = remaining, signs
    level = (layer.codes() + codes.offset) * signs.reshape(shape)
    step = positive(layer.step) * factor.abs().reshape(layer.step.shape)
    layer.step.copy_(step.clamp_min(SMALLEST_STEP))
    weight.copy_(level * layer.step)
    if layer.slope_mask is not None:
        weight.mul_(layer.slope_mask)
    layer.end_sharing()
    return remaining
