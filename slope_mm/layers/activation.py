"""The A of A4/W4: LSQ on the input of a compressed layer, with a calibrated range and sign."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from slope_mm.errors import SlopeError
from slope_mm.layers.spec import LayerSpec
from slope_mm.ops import Codes, activation_codes, grad_scale, mse_init_step, positive
from slope_mm.ops.activation_pass import quantize_forward
from slope_mm.ops.compress import Compress
from slope_mm.ops.learned_step import QuantizeLSQ
from slope_mm.ops.tracing import is_compiling

# Values kept per observed call and per layer: enough to place a clip range, small enough to hold
# for every layer of a detector at once.
SAMPLES_PER_CALL = 2048
MAX_SAMPLES = 16384

UNCALIBRATED, UNSIGNED, SIGNED = -1, 0, 1


def quantize_activation(
    x: Tensor,
    step: Tensor,
    codes: Codes,
    batch_axis: int | None = 0,
    room: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Quantizes a layer's input per tensor.

    The step's gradient is scaled by the number of features of one sample, since losses are means
    over the batch.

    Args:
        x: Input.
        step: Learned step of shape [1].
        codes: From :func:`~slope_mm.ops.activation_codes`.
        batch_axis: The axis that samples lie along; None for a single one without that axis.
        room: Where the result goes, if no gradients are asked for.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    if torch.jit.is_tracing():
        return _in_plain_operators(x, step, codes)
    if room is not None and not torch.is_grad_enabled() and not is_compiling():
        return quantize_forward(x, step, codes, room)
    samples = 1 if batch_axis is None else max(x.shape[batch_axis], 1)
    features = x.numel() / samples
    quantized: Tensor = QuantizeLSQ.apply(x, step, codes, grad_scale(features, codes))
    return quantized


def _in_plain_operators(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """The same values from operators that torch.jit.trace records, one by one."""
    s = positive(step)
    scaled = x.to(torch.promote_types(x.dtype, s.dtype)) / s - codes.offset
    return ((scaled.round().clamp(codes.qn, codes.qp) + codes.offset) * s).to(x.dtype)


class _Again(NamedTuple):
    """Stands for a saved view of what a graph node computed until the backward pass asks for it."""

    node: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


# Graph nodes by what computes their result again.
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    f'{kind.__name__}Backward': kind.again for kind in (QuantizeLSQ, Compress)
}


_NOTHING = nullcontext()


def _comes_again(x: Tensor) -> bool:
    """Whether the backward pass may compute a tensor once more instead of finding it kept."""
    node: Any = x.grad_fn
    kind = type(node).__name__
    return (
        node is not None
        and kind in _AGAIN
        and (kind != f'{Compress.__name__}Backward' or node.let_go)
    )


def kept_as_recipe(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Scope in which operators that keep a tensor for their backward keep how it was made instead.

    A quantized input is quantized again when the backward pass needs it, from the values before
    quantization, which the graph holds anyway (a ReLU keeps its result); otherwise every quantized
    activation would be in memory twice. A weight that its layer lets go of
    (:class:`~slope_mm.layers.sharing.SharedWeight`) is compressed again.

    Args:
        *tensors: What :func:`quantize_activation` returned, and compressed weights; anything else
            is left alone.
    """
    again = [x for x in tensors if _comes_again(x)]
    if not again or is_compiling():
        return _NOTHING
    nodes = {(x.untyped_storage().data_ptr(), x.dtype): x.grad_fn for x in again}

    def pack(tensor: Tensor) -> Tensor | _Again:
        node = nodes.get((tensor.untyped_storage().data_ptr(), tensor.dtype))
        if node is None:
            return tensor
        return _Again(node, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        values = _AGAIN[type(kept.node).__name__](kept.node)
        return values.as_strided(kept.size, kept.stride, kept.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class ActivationObserver:
    """Collects a bounded sample of what a layer's input looks like.

    Attributes:
        low: Smallest value seen (0-dim tensor), or None before the first call. What held NaN or
            infinity anywhere leaves a NaN among the samples.
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
            # Zero times what is finite: NaN where any value is not, sampled or not.
            sample[0] += 0 * low + 0 * flat.max()
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


def _warn_of_full_precision(x: Tensor) -> None:
    """Says (once, by Python's default) that an evaluation is not that of the recipe."""
    if not is_compiling() and x.device.type != 'meta' and bool(x.any()):
        warnings.warn(
            "a layer's input has no range yet, and is not quantized: the recipe's activation bits"
            ' are not in what this model computes. Load a compressed checkpoint, or train or'
            ' calibrate first',
            stacklevel=2,
        )


def _one_of_several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _unquantized(x: Tensor, step: Tensor) -> Tensor:
    """The input as it is, with the step in its graph."""
    if not (torch.is_grad_enabled() and step.requires_grad and x.is_floating_point()):
        return x
    return x + 0 * step.sum().to(x.dtype)


def _refuse_tracing(x: Any) -> None:
    if isinstance(x, torch.fx.Proxy):
        raise SlopeError(
            'a compressed layer looks at values, so torch.fx cannot trace it; where that was'
            " mmengine's efficient_conv_bn_eval, remove it from the config"
        )


def input_name(kwargs: Mapping[str, Any]) -> str:
    """The name of a layer's input among its arguments: torch's ``input``, mmcv's ``x``, others'."""
    return next((name for name in ('input', 'x') if name in kwargs), next(iter(kwargs)))


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer was called on, by place or by name."""
    return args[0] if args else kwargs[input_name(kwargs)]


class QuantizedInput(nn.Module):
    """The part of a compressed layer that quantizes its inputs.

    Most layers have one input. An attention's projection has three (query, key and value), each
    with a range of its own.

    Class attributes:
        inputs: Number of inputs.
        batch_axis: The inputs' axis that samples lie along; an attention sets its projections'.

    State (:class:`~slope_mm.layers.CompressedLayer` sets it up): ``slope_act_step`` and
    ``slope_act_signed``, one element an input, and ``_act_states``, the latter's mirror, so that a
    forward never asks a GPU.
    """

    inputs = 1
    batch_axis: int | None = 0

    slope_spec: LayerSpec
    slope_act_step: nn.Parameter | None
    slope_act_signed: Tensor
    runs: int
    _act_states: list[int]
    _observers: list[ActivationObserver]
    _room: Callable[[Tensor], Tensor] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether every input's range and sign are known, or not needed."""
        if self.slope_spec.activation_bits is None:
            return True
        return all(self._input_state(which) != UNCALIBRATED for which in range(self.inputs))

    def _input_state(self, which: int) -> int:
        """UNCALIBRATED, UNSIGNED or SIGNED, as the buffer says; a GPU is not asked twice."""
        known = self._act_states[which]
        if known == UNCALIBRATED and self.slope_spec.activation_bits is not None:
            # Whoever averages models or broadcasts buffers writes to the buffer alone.
            known = self._act_states[which] = int(self.slope_act_signed[which])
        return known

    def input_signed(self, which: int = 0) -> bool | None:
        """Whether negative codes are used for an input; None where it is not quantized (yet)."""
        if self.slope_spec.activation_bits is None or self._input_state(which) == UNCALIBRATED:
            return None
        return self._act_states[which] == SIGNED

    @property
    def activation_signed(self) -> bool | None:
        """:meth:`input_signed` of a layer's only input, or its first."""
        return self.input_signed()

    def begin_observing(self) -> None:
        """Passes inputs through unquantized and collects what they look like."""
        self._observers = [ActivationObserver() for _ in range(self.inputs)]

    def end_observing(self) -> list[ActivationObserver]:
        """Stops observing and returns what was seen of each input."""
        observers, self._observers = self._observers, []
        return observers

    @torch.no_grad()
    def set_activation_range(self, samples: Tensor, signed: bool, which: int = 0) -> None:
        """Fixes sign and first step of an input's quantizer.

        An input of zeros alone (a dead branch), or one with NaN or infinity in it, says nothing
        about the range: it stays uncalibrated and passes through.

        Args:
            samples: Sampled input values, flat.
            signed: Whether negative values occur.
            which: The input's number.
        """
        bits = self.slope_spec.activation_bits
        if bits is None or self.slope_act_step is None or not bool(samples.any()):
            return
        if not bool(samples.isfinite().all()):
            return
        self.slope_act_step[which] = calibrated_step(samples, signed, bits)[0]
        self._act_states[which] = SIGNED if signed else UNSIGNED
        self.slope_act_signed[which] = self._act_states[which]

    def count_run(self) -> None:
        """Notes that the layer's weight is about to be used."""
        # Activation checkpointing runs a training forward without gradients first.
        if self.training or torch.is_grad_enabled():
            # Past nn.Module's __setattr__, which looks at what each value is.
            self.__dict__['runs'] += 1

    def operand(self, x: Tensor) -> Tensor:
        """:meth:`quantized_input` for an operator that reads it at once and returns something new.

        Nobody else may see it: outside training the next layer's lies in the same memory.
        """
        return self.quantized_input(x, room=self._room)

    def quantized_input(
        self, x: Tensor, which: int = 0, room: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """An input as the layer sees it.

        An uncalibrated layer in training calibrates itself on the input at hand (as LSQ does); in
        evaluation, and where several processes train (each has another input), it passes the input
        through. In training the step takes part even then: DDP waits for its gradient, here zero.

        Args:
            x: The input.
            which: Its number.
            room: Where the result goes, if it is quantized and no gradients are asked for.
        """
        if type(x) is not Tensor:
            _refuse_tracing(x)
        self.count_run()
        bits = self.slope_spec.activation_bits
        if bits is None:
            return x
        step: Tensor | None = self.slope_act_step
        if step is None:
            return x
        if self._observers:
            self._observers[which].observe(x)
            return x
        if self._input_state(which) == UNCALIBRATED:
            if not self.training:
                _warn_of_full_precision(x)
                return x
            if x.numel() == 0 or _one_of_several_processes():
                return _unquantized(x, step)
            observer = ActivationObserver()
            observer.observe(x)
            self.set_activation_range(
                torch.cat(observer.samples),
                bool(observer.low < 0),  # type: ignore[operator]
                which,
            )
            if self._act_states[which] == UNCALIBRATED:
                return _unquantized(x, step)
        codes = activation_codes(bits, self._act_states[which] == SIGNED)
        if self.inputs > 1:
            # A copy: calibrating the next input writes to the parameter before the backward pass.
            step = step[which : which + 1].clone()
        return quantize_activation(x, step, codes, self.batch_axis, room)
