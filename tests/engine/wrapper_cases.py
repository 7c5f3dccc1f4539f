"""Optim wrappers and models of the tests of the optim wrapper, and L_reg by hand."""

from __future__ import annotations

import math
from typing import Any

import tiny
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import slope_mm
from slope_mm import compressed_layers

CONSTRUCTOR = 'slope_mm.SlopeOptimWrapperConstructor'
SGD = dict(type='SGD', lr=0.1)


def wrapper_of(model: nn.Module, **options: Any) -> OptimWrapper:
    regularizer = dict(type='cosine', weight=2.0)
    settings = dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=regularizer, **options)
    wrapper = build_optim_wrapper(model, settings)
    # The Runner does this before it trains.
    wrapper.initialize_count_status(model, 0, wrapper._accumulative_counts)
    return wrapper


def regularized(model: nn.Module, **regularizer: Any) -> OptimWrapper:
    settings = dict(constructor=CONSTRUCTOR, optimizer=SGD, regularizer=regularizer)
    return build_optim_wrapper(model, settings)


def gradients_at_step(wrapper: OptimWrapper, model: nn.Module) -> dict[str, Tensor]:
    """A dict that fills with the gradients that the optimizer is about to use."""
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        named = model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    wrapper.optimizer.register_step_pre_hook(keep)
    return found


def toy_batch(first: int, count: int) -> dict[str, list[Tensor]]:
    images = [tiny.ToyImages()[index] for index in range(first, first + count)]
    return {key: [image[key] for image in images] for key in images[0]}


def calibrated_toy(**options: Any) -> nn.Module:
    init_default_scope('mmengine')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(type='slope_mm.SlopeModel', arch='ToyNet', **{'recipe': tiny.TOY_RECIPE, **options})
    ).train()
    slope_mm.calibrate(model, [toy_batch(0, 8)])
    return model


# --- L_reg in plain float64 autograd ---


def kept_of_groups(weight: Tensor, axis: int, n: int, m: int) -> Tensor:
    """N:M by sorting each group, independently of slope_mm."""
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, m))
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.flatten(-2).movedim(-1, axis)


class ByHand:
    """A layer's L_reg term in plain float64 autograd: the formulas, written out."""

    def __init__(self, layer: Any, straight_through: bool) -> None:
        self.w = layer.weight.detach().double().requires_grad_()
        self.step = layer.slope_step.detach().double().requires_grad_()
        spec, axis = layer.slope_spec, layer.output_axis
        # Straight through the mask, or not at all.
        source = self.w if straight_through else self.w.detach()
        kept = source.numel()
        if spec.pattern is not None:
            mask = kept_of_groups(layer.weight.detach(), layer.input_axis, 2, 4)
            source = source + (source * mask - source).detach()
            kept = int(mask.sum())
        low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        scale = 1 / math.sqrt(kept / self.w.shape[axis] * high)
        step = self.step * scale + (self.step - self.step * scale).detach()
        v = (source / step).clamp(low, high)
        # Exact means that codes are constants: of W, and of the step that scales them.
        code = v + (v.round() - v).detach() if straight_through else v.round().detach()
        self.compressed = code * step
        self.axis = axis

    def terms(self, kind: str, granularity: str) -> Tensor:
        a, b = self.w, self.compressed
        if granularity == 'filter':
            a, b = (x.movedim(self.axis, 0).flatten(1) for x in (a, b))
        else:
            a, b = a.reshape(1, -1), b.reshape(1, -1)
        if kind == 'l2':
            return (a - b).square().sum(1) / a.square().sum(1)
        return 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def l_reg_by_hand(
    model: nn.Module, kind: str, granularity: str, gradient: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_reg over the trainable layers of a model and its gradients by parameter name."""
    terms, leaves = [], {}
    for name, layer in compressed_layers(model).items():
        if layer.weight.requires_grad:
            by_hand = ByHand(layer, gradient == 'ste')
            terms.append(by_hand.terms(kind, granularity))
            leaves[f'{name}.weight'], leaves[f'{name}.slope_step'] = by_hand.w, by_hand.step
    value = torch.cat(terms).mean()
    value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}
