"""One weight through mask, quantizer and regularizer, beside what other toolkits take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from slope_mm.ops import NMPattern, compress_with_powers, mse_init_step, regularize, weight_codes
from slope_mm.ops.fused import fused

SHAPE = (512, 512, 3, 3)
# That have to be moved for each weight: W in and its compressed form out; the gradient and W in,
# and W's gradient out.
WEIGHT_BYTES = 20
# Triton's kernels of the weight pass (slope_mm.ops.triton_kernels), as a profiler names them.
WEIGHT_KERNELS = ('forward_kernel', 'backward_kernel')
PATTERNS = ('2:4', '1:4', '2:8', '4:8', '2:16')


class _Case:
    """A weight, its step and an upstream gradient, as a layer of Mask R-CNN R50 has them."""

    def __init__(self, shape: tuple[int, ...], device: str, bits: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(shape, generator=generator).mul_(0.02).to(device).requires_grad_()
        self.upstream = torch.randn(shape, generator=generator).to(device)
        self.codes = weight_codes('lsq', bits)
        self.step = mse_init_step(self.weight, self.codes).requires_grad_()

    def ours(self, pattern: str, kernels: bool = False) -> Callable[[], Any]:
        """Mask, quantizer and cosine regularizer, forward and backward."""
        n, m = map(int, pattern.split(':'))

        def run() -> None:
            self.weight.grad = self.step.grad = None
            with fused(kernels):
                weight, powers = compress_with_powers(
                    self.weight,
                    self.step,
                    self.codes,
                    pattern=NMPattern(n, m),
                    # As a layer has it: where that does not stall a GPU.
                    check_finite=self.weight.device.type == 'cpu',
                )
                loss = regularize('cosine', [powers]).sum()
                torch.autograd.backward([weight, loss], [self.upstream, torch.ones_like(loss)])

        return run

    def plain_autograd(self) -> Callable[[], Any]:
        """The same by plain differentiable torch operations, as a paper's code would have it."""

        def run() -> None:
            self.weight.grad = self.step.grad = None
            groups = self.weight.unflatten(1, (-1, 4))
            kept = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, 2).indices, 1.0)
            sparse = self.weight + (kept.flatten(1, 2) * self.weight - self.weight).detach()
            scaled = (sparse / self.step).clamp(self.codes.qn, self.codes.qp)
            weight = (scaled + (scaled.round() - scaled).detach()) * self.step
            loss = 1 - torch.nn.functional.cosine_similarity(
                self.weight.flatten(), weight.flatten(), dim=0
            )
            torch.autograd.backward([weight, loss], [self.upstream, torch.ones_like(loss)])

        return run

    def torch_ao(self) -> Callable[[], Any]:
        """torch.ao's learnable per-channel fake quantization alone."""
        scale = self.step.detach().flatten().clone().requires_grad_()
        zero = torch.zeros_like(scale, requires_grad=True)

        def run() -> None:
            self.weight.grad = scale.grad = None
            torch._fake_quantize_learnable_per_channel_affine(
                self.weight, scale, zero, 0, self.codes.qn, self.codes.qp, 1.0
            ).backward(self.upstream)

        return run

    def brevitas(self) -> Callable[[], Any]:
        """Brevitas' learned-step weight quantizer alone (per channel)."""
        from brevitas import nn as brevitas_nn

        layer = brevitas_nn.QuantConv2d(
            self.weight.shape[1],
            self.weight.shape[0],
            self.weight.shape[2],
            weight_bit_width=4,
            weight_scaling_impl_type='parameter_from_stats',
            weight_scaling_per_output_channel=True,
            bias=False,
        ).to(self.weight.device)

        def run() -> None:
            layer.zero_grad()
            layer.quant_weight().value.backward(self.upstream)

        run()
        return run

    def modelopt(self) -> Callable[[], Any]:
        """NVIDIA ModelOpt's quantized weight alone (a static scale; its 2:4 mask is fixed)."""
        from modelopt.torch.quantization.config import (
            QuantizerAttributeConfig,
        )
        from modelopt.torch.quantization.nn import (
            TensorQuantizer,
        )

        quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, axis=0))
        quantizer.amax = self.weight.detach().abs().amax((1, 2, 3), keepdim=True)
        mask = torch.ones_like(self.weight, dtype=torch.bool)

        def run() -> None:
            self.weight.grad = None
            quantizer(self.weight * mask).backward(self.upstream)

        run()
        return run


def layer_arms(
    device: str = 'cpu', shape: tuple[int, ...] = SHAPE, with_compiled: bool = True, cases: int = 1
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The arms of ``benchmark.py layer``.

    Args:
        device: Where the weights are.
        shape: Their shape.
        with_compiled: Whether the fused kernels have arms.
        cases: Weights that calls of an arm take in turn: as many as no cache holds.

    Returns:
        ``(arms, skipped)``: name to what is timed, and name to why a peer is not.
    """
    turns = [_Case(shape, device) for _ in range(cases)]
    arms = {f'slope_mm {p}': _in_turn([case.ours(p) for case in turns]) for p in PATTERNS}
    if with_compiled:
        for p in PATTERNS:
            arms[f'slope_mm {p} compiled'] = _in_turn([c.ours(p, kernels=True) for c in turns])
    arms['plain autograd 2:4'] = _in_turn([case.plain_autograd() for case in turns])
    copied = torch.empty_like(turns[0].weight.detach())
    arms['one copy of the weight'] = _in_turn(
        [partial(copied.copy_, case.weight.detach()) for case in turns]
    )
    skipped: dict[str, str] = {}
    for name, make in (
        ('torch.ao quantizer', _Case.torch_ao),
        ('Brevitas quantizer', _Case.brevitas),
        ('ModelOpt quantizer', _Case.modelopt),
    ):
        try:
            arms[name] = _in_turn([make(case) for case in turns])
        except ImportError as problem:
            skipped[name] = f'not installed ({problem})'
    return arms, skipped


def _in_turn(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    following = itertools.cycle(runs)
    return lambda: next(following)()
