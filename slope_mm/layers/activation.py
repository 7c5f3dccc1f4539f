"""The A of A4/W4: LSQ on the input of a compressed layer, with a calibrated range and sign."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from slope_mm.errors import SlopeError
from slope_mm.layers.spec import LayerSpec
from slope_mm.ops import Codes, activation_codes, grad_scale, lsq_quantize, mse_init_step
from slope_mm.ops.learned_step import QuantizeLSQ
from slope_mm.ops.tracing import is_compiling

# Values kept per observed call and per layer: enough to place a clip range, small enough to hold
# for every layer of a detector at once.
SAMPLES_PER_CALL = 2048
MAX_SAMPLES = 16384

UNCALIBRATED, UNSIGNED, SIGNED = -1, 0, 1


def quantize_activation(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """Quantizes a layer's input per tensor.

    The step's gradient is scaled by the number of features of one sample, since losses are means
    over the batch.

    Args:
        x: Input, batch first.
        step: Learned step of shape [1].
        codes: From :func:`~slope_mm.ops.activation_codes`.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    features = x.numel() / max(x.shape[0], 1)
    return lsq_quantize(x, step, codes.qn, codes.qp, grad_scale(features, codes), codes.offset)


class _Again(NamedTuple):
    """Stands for a saved view of a quantized input until the backward pass asks for it."""

    node: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def kept_as_recipe(quantized: Tensor) -> AbstractContextManager[Any]:
    """Scope in which operators that keep a quantized input for their backward do not keep a copy.

    It is quantized again when the backward pass needs it, from the values before quantization,
    which the graph holds anyway (a ReLU keeps its result). Otherwise every quantized activation
    would be in memory twice.

    Args:
        quantized: What :func:`quantize_activation` returned; anything else is left alone.
    """
    node = quantized.grad_fn
    if type(node).__name__ != f'{QuantizeLSQ.__name__}Backward' or is_compiling():
        return nullcontext()
    storage = quantized.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor | _Again:
        if tensor.untyped_storage().data_ptr() != storage or tensor.dtype != quantized_dtype:
            return tensor
        return _Again(node, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        values = QuantizeLSQ.again(kept.node)
        return values.as_strided(kept.size, kept.stride, kept.offset)

    quantized_dtype = quantized.dtype
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class ActivationObserver:
    """Collects a bounded sample of what a layer's input looks like.

    Attributes:
        low: Smallest value seen (0-dim tensor), or None before the first call.
        samples: Sampled values of every observed call.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.samples: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Records one input; empty ones (no RoI in an image) say nothing."""
        if x.numel() == 0:
            return
        flat = x.detach().float().reshape(-1)
        low = flat.min()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        if self._count < MAX_SAMPLES:
            # An odd stride does not run along one column of the feature map.
            stride = max(1, flat.numel() // SAMPLES_PER_CALL) | 1
            sample = flat[::stride][:SAMPLES_PER_CALL].clone()
            self.samples.append(sample)
            self._count += sample.numel()

    @property
    def seen(self) -> bool:
        """Whether anything was observed."""
        return self.low is not None


def calibrated_step(samples: Tensor, signed: bool, bits: int) -> Tensor:
    """The step of least squared error on sampled inputs.

    Args:
        samples: Sampled values, flat.
        signed: Whether the input takes negative values.
        bits: Activation bits.

    Returns:
        fp32 step of shape [1].
    """
    return mse_init_step(samples, activation_codes(bits, signed), axis=None).reshape(1)


def _one_of_several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _refuse_tracing(x: Any) -> None:
    if isinstance(x, torch.fx.Proxy):
        raise SlopeError(
            'a compressed layer looks at values, so torch.fx cannot trace it; where that was'
            " mmengine's efficient_conv_bn_eval, remove it from the config"
        )


class QuantizedInput(nn.Module):
    """The part of a compressed layer that quantizes its input.

    State (:class:`~slope_mm.layers.CompressedLayer` sets it up): ``slope_act_step``,
    ``slope_act_signed``, and ``_act_state``, its mirror, so that a forward never asks a GPU.
    """

    slope_spec: LayerSpec
    slope_act_step: nn.Parameter | None
    slope_act_signed: Tensor
    runs: int
    _act_state: int
    _observer: ActivationObserver | None

    @property
    def calibrated(self) -> bool:
        """Whether the input's range and sign are known, or not needed."""
        return self.slope_spec.activation_bits is None or self._input_state() != UNCALIBRATED

    def _input_state(self) -> int:
        """UNCALIBRATED, UNSIGNED or SIGNED, as the buffer says; a GPU is not asked twice."""
        if self._act_state == UNCALIBRATED and self.slope_spec.activation_bits is not None:
            # Whoever averages models or broadcasts buffers writes to the buffer alone.
            self._act_state = int(self.slope_act_signed)
        return self._act_state

    @property
    def activation_signed(self) -> bool | None:
        """Whether negative codes are used for the input; None without quantized input."""
        if self.slope_spec.activation_bits is None or self._input_state() == UNCALIBRATED:
            return None
        return self._act_state == SIGNED

    def begin_observing(self) -> None:
        """Passes inputs through unquantized and collects what they look like."""
        self._observer = ActivationObserver()

    def end_observing(self) -> ActivationObserver | None:
        """Stops observing and returns what was seen."""
        observer, self._observer = self._observer, None
        return observer

    @torch.no_grad()
    def set_activation_range(self, samples: Tensor, signed: bool) -> None:
        """Fixes sign and first step of the input quantizer.

        An input of zeros alone (a dead branch) says nothing about the range: the layer stays
        uncalibrated and passes it through.

        Args:
            samples: Sampled input values, flat.
            signed: Whether negative values occur.
        """
        bits = self.slope_spec.activation_bits
        if bits is None or self.slope_act_step is None or not bool(samples.any()):
            return
        self.slope_act_step.copy_(calibrated_step(samples, signed, bits))
        self._act_state = SIGNED if signed else UNSIGNED
        self.slope_act_signed.fill_(self._act_state)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as the layer sees it.

        An uncalibrated layer in training calibrates itself on the input at hand (as LSQ does); in
        evaluation, and where several processes train (each has another input), it passes the input
        through.
        """
        _refuse_tracing(x)
        # Activation checkpointing runs a training forward without gradients first.
        if self.training or torch.is_grad_enabled():
            self.runs += 1
        bits = self.slope_spec.activation_bits
        if bits is None or self.slope_act_step is None:
            return x
        if self._observer is not None:
            self._observer.observe(x)
            return x
        if self._input_state() == UNCALIBRATED:
            if not self.training or x.numel() == 0 or _one_of_several_processes():
                return x
            observer = ActivationObserver()
            observer.observe(x)
            self.set_activation_range(torch.cat(observer.samples), bool(observer.low < 0))  # type: ignore[operator]
            if self._act_state == UNCALIBRATED:
                return x
        codes = activation_codes(bits, self._act_state == SIGNED)
        return quantize_activation(x, self.slope_act_step, codes)
