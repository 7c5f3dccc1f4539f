"""What every compressed layer can do, whatever operator it computes.

A dense layer becomes a compressed one by swapping its class in place, so this mixin has no
``__init__`` of its own: :meth:`CompressedLayer.start_compression` adds the state. Stock state-dict
keys keep their stock meaning (``weight`` is the latent W); everything else starts with ``slope_``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.errors import TensorError
from slope_mm.layers.activation import UNCALIBRATED
from slope_mm.layers.sharing import SharedWeight, is_recomputed
from slope_mm.layers.spec import LayerSpec
from slope_mm.layers.state import SavedState
from slope_mm.ops import (
    SMALLEST_STEP,
    SR_STE_DECAY,
    Codes,
    NMPattern,
    compress_weight,
    compress_with_powers,
    grad_scale,
    mse_init_step,
    positive,
    step_shape,
    to_codes,
)
from slope_mm.ops.compress_many import Many, many_fit
from slope_mm.ops.sparsity import Pattern
from slope_mm.ops.tracing import untraced
from slope_mm.ops.weight_pass import Groups

#: The parameters that compression adds.
_STEPS = ('slope_step', 'slope_act_step')
_OWN_ATTRIBUTES = (
    'slope_spec',
    '_codes',
    '_pattern_now',
    '_step_ready',
    '_placeholder',
    '_act_states',
    '_many',
    '_shared',
    '_sharing',
    '_room',
    '_sums',
    '_let_go',
    '_observers',
    'runs',
    'loss_factor',
    'batch_axis',
)


class CompressedLayer(SavedState):
    """Mixin of a layer whose ``weight`` is masked and quantized before it is used.

    Class attributes:
        input_axis: Axis of ``weight`` that N:M groups run along (input channels).
        output_axis: Axis of ``weight`` that per-channel steps run along (output channels).
        baked_type: Class of the baked layer, if not the stock one.
        baked_hook: Class of the hook that keeps a baked layer's input quantizer, if not the usual.

    State beside the stock one:
        slope_step: Parameter, learned weight steps, fp32, broadcastable to ``weight``.
        slope_act_step: Parameter of shape [inputs], learned activation steps, fp32.
        slope_act_signed: Buffer, int8 of shape [inputs]: -1 uncalibrated, 0 unsigned, 1 signed.
        slope_mask: Buffer, bool of ``weight``'s shape; present only while the mask is held.
        slope_layer: Buffer, the spec as ASCII bytes, by which another recipe's checkpoint is told.
    """

    input_axis = 1
    output_axis = 0
    baked_type: type[nn.Module] | None = None
    baked_hook: type | None = None

    weight: Tensor
    slope_spec: LayerSpec
    slope_step: nn.Parameter | None
    slope_act_step: nn.Parameter | None
    slope_act_signed: Tensor
    slope_mask: Tensor | None

    def start_compression(self, spec: LayerSpec) -> None:
        """Adds the compression's state to a layer whose class was just swapped."""
        self.slope_spec = spec
        self._codes = spec.weight_codes
        self._pattern_now: Pattern | None = spec.pattern
        self._step_ready = False
        self._placeholder = None
        self._act_states = [UNCALIBRATED] * self.inputs
        self._many: tuple[tuple[Any, ...], Many | None] | None = None
        self._shared = None
        self._sharing = False
        # Recomputation in a backward pass has to repeat what the forward did: outlives a scope.
        self._sums = True
        self._let_go = False
        self._observers = []
        # How often the layer ran for training since it was last reset.
        self.runs = 0
        # What the training loop multiplies losses by (AMP scale over accumulated batches): the
        # part of SR-STE's gradient that is not a loss has to follow it.
        self.loss_factor = 1.0
        # A frozen weight's step is frozen too, or DDP would wait for its gradient.
        trains = self.weight.requires_grad
        state = self.first_state(self.weight.device)
        for key in _STEPS:
            step = state.get(key)
            own = None if step is None else nn.Parameter(step, requires_grad=trains)
            self.register_parameter(key, own)
        if 'slope_act_signed' in state:
            self.register_buffer('slope_act_signed', state['slope_act_signed'])
        self.register_buffer('slope_mask', None)
        self.register_buffer('slope_layer', state['slope_layer'])
        if self._codes is not None:
            self._await_initialisation()

    def first_state(self, device: torch.device) -> dict[str, Tensor]:
        spec, state = self.slope_spec, {}
        if self._codes is not None:
            axis = self.output_axis if spec.step == 'channel' else None
            shape = step_shape(tuple(self.weight.shape), axis)
            state['slope_step'] = torch.ones(shape, device=device)
        if spec.activation_bits is not None:
            state['slope_act_step'] = torch.ones(self.inputs, device=device)
            state['slope_act_signed'] = torch.full(
                (self.inputs,), UNCALIBRATED, dtype=torch.int8, device=device
            )
        text = torch.frombuffer(bytearray(spec.signature.encode()), dtype=torch.uint8)
        state['slope_layer'] = text.to(device)
        return state

    def settle(self) -> None:
        """Takes away what a baked layer of another class than the stock one has no use for."""

    def stop_compression(self) -> None:
        """Removes everything that :meth:`start_compression` added."""
        for store in (self._parameters, self._buffers):
            for key in [key for key in store if key.startswith('slope_')]:
                del store[key]
        for key in _OWN_ATTRIBUTES:
            self.__dict__.pop(key, None)

    @property
    def steps(self) -> dict[str, nn.Parameter]:
        """The learned steps by their names in this layer: of weights, of inputs, or both."""
        found = {key: self._parameters[key] for key in _STEPS}
        return {key: step for key, step in found.items() if step is not None}

    # --- weight ------------------------------------------------------------------------------

    def latent_weight(self) -> Tensor:
        """What mask and codes are computed from: ``weight``, or what the layer makes of it."""
        return self.weight

    def sources(self) -> Iterable[Tensor | None]:
        """All that the compressed weight depends on."""
        return self.weight, self.slope_step, self.slope_mask

    @property
    def mask(self) -> Tensor | None:
        """Bool tensor of ``weight``'s shape, True where kept; None where dense."""
        if self._pattern_now is None:
            return None
        return self.live_mask() if self.slope_mask is None else self.slope_mask

    @torch.no_grad()
    def live_mask(self, check_finite: bool = True) -> Tensor | None:
        """The mask that ``weight`` asks for now, whether or not one is held."""
        if self._pattern_now is None:
            return None
        ranked = self.latent_weight()
        if self.slope_spec.order == 'q_then_s' and self._codes is not None:
            ranked = compress_weight(ranked, self.step, None, self._codes)
        return self._pattern_now.mask(ranked, self.input_axis, check_finite=check_finite)

    @property
    def changes_weight(self) -> bool:
        """Whether the compressed weight differs from the latent one (else only inputs do)."""
        return self.slope_spec.pattern is not None or self._codes is not None

    @property
    def step(self) -> Tensor | None:
        """The learned weight steps, initialised from ``weight`` if they were not yet."""
        if self._codes is None:
            return None
        if not self._step_ready:
            self._initialise_placeholder()
            self._step_ready = True
        return self.slope_step

    @torch.no_grad()
    def initialise_step(self) -> None:
        """Sets the weight steps to those of least squared error on the kept weights."""
        if self._codes is None or self.slope_step is None:
            return
        axis = self.output_axis if self.slope_spec.step == 'channel' else None
        # Under q_then_s every weight is quantized before the mask is known.
        mask = None
        if self.slope_spec.order == 's_then_q' and self._pattern_now is not None:
            mask = self.slope_mask if self.slope_mask is not None else self.live_mask()
        self.slope_step.copy_(mse_init_step(self.latent_weight(), self._codes, axis, mask))
        self.give_usual_steps()

    @torch.no_grad()
    def give_usual_steps(self) -> None:
        """Gives weights of zero (many a last layer begins with them) a usual step: any fits them.

        Beside the smallest one the first update would clip them all, and nothing could be learned
        any more. Levels without a zero wait for :meth:`leave_zero`.
        """
        if self._codes is not None and self.slope_step is not None and self._codes.offset == 0:
            usual = self._usual_step(self._codes)
            self.slope_step.masked_fill_(self.slope_step <= SMALLEST_STEP, usual)

    def _usual_step(self, codes: Codes) -> float:
        """The step of a layer whose weights are as large as usual."""
        fan_in = self.weight.numel() / max(self.weight.shape[self.output_axis], 1)
        return 1 / (math.sqrt(max(fan_in, 1)) * codes.largest)

    @torch.no_grad()
    def leave_zero(self) -> None:
        """Gives weights that were all zero a usual step once an update has moved them.

        Levels without a zero are as close to zero as their step is small, so weights of zero begin
        with the smallest one, beside which everything that they could learn would be clipped.
        """
        step = self.slope_step
        if self._codes is None or self._codes.offset == 0 or step is None or not step.requires_grad:
            return
        # An update changes even the smallest step by a share of itself.
        asleep = step <= 2 * SMALLEST_STEP
        # A GPU would have to be waited for.
        if step.device.type == 'cpu' and not bool(asleep.any()):
            return
        axes = [i for i, size in enumerate(step.shape) if size == 1]
        moved = self.latent_weight().abs().amax(axes, keepdim=True).to(step.dtype) > 0
        step.masked_fill_(asleep & moved.reshape(step.shape), self._usual_step(self._codes))

    def compressed_weight(self) -> Tensor:
        """The weight that the layer computes with, differentiable in W and the step.

        Inside a sharing scope (a training step, an evaluation) it is computed once.

        Returns:
            Tensor of ``weight``'s shape and dtype.

        Raises:
            TensorError: If ``weight`` holds NaN or infinity (checked wherever that does not stall
                a GPU).
        """
        if torch.jit.is_tracing():
            # A constant of the graph.
            with untraced(), torch.no_grad():
                return self._compressed_weight()
        return self._compressed_weight()

    def _compressed_weight(self) -> Tensor:
        compressed, _ = self._compressed(sums=False)
        assert compressed is not None
        return compressed

    def weight_powers(self) -> Tensor:
        """``w·w``, ``w·ŵ`` and ``ŵ·ŵ`` per output channel: all that the regularizers look at.

        Differentiable in W and the step with the exact gradient: the compressed weight is constant
        in W, and linear in the step.

        Returns:
            fp32 of shape ``[3, output channels]``.
        """
        return self._compressed(sums=True)[1]

    def _compressed(self, sums: bool) -> tuple[Tensor | None, Tensor]:
        """The sums if they are wanted, else the weight; the other one comes along where it is."""
        weight, step = self.weight, self.slope_step
        # Steps may learn where the weight is frozen.
        trains = weight.requires_grad or (step is not None and step.requires_grad)
        wants_grad = torch.is_grad_enabled() and trains
        # Outside of the step's scope, in which recomputation takes place, every run compresses.
        sharing = self._sharing and not (wants_grad and is_recomputed())
        shared = self._shared if sharing else None
        if shared is not None and shared.serves(wants_grad, sums):
            return shared.outputs(wants_grad)
        sums = sums or (self._sums and wants_grad)
        pattern, mask = self._pattern_now, self.slope_mask
        fused = isinstance(pattern, NMPattern) and self.slope_spec.order == 's_then_q'
        finite = weight.device.type == 'cpu'
        if mask is None and not fused:
            mask = self.live_mask(check_finite=finite)
        with torch.autocast(weight.device.type, enabled=False):
            compressed, powers = compress_with_powers(
                self.latent_weight(),
                self.step,
                self._codes,
                pattern=pattern if fused and mask is None else None,  # type: ignore[arg-type]
                mask=mask,
                axes=(self.output_axis, self.input_axis),
                grad_scale=self._grad_scale,
                gradient=self.slope_spec.gradient,
                decay=SR_STE_DECAY * self.loss_factor,
                sums=sums,
                check_finite=finite,
            )
        if sharing:
            # A weight that is used once more after all is held from then on.
            let_go = self._let_go and wants_grad and shared is None
            self._shared = SharedWeight(compressed, powers, sums, let_go)
        return compressed, powers

    def one_of_many(self) -> Many | None:
        """What :func:`~slope_mm.ops.compress_many.compress_many` takes of the layer.

        None where it has to be compressed on its own.
        """
        # Asked before every step: what it depends on is compared by identity.
        now = self.weight, self.step, self.slope_mask, self._pattern_now, self.slope_spec
        known = self._many
        if known is None or any(a is not b for a, b in zip(known[0], now, strict=True)):
            known = self.__dict__['_many'] = now, self._make_one_of_many()
        one = known[1]
        fits = one is not None and many_fit(one.weight, one.mask, one.gradient)
        return one if fits else None

    def _make_one_of_many(self) -> Many | None:
        pattern, mask, step = self._pattern_now, self.slope_mask, self.step
        if self._codes is None or step is None or step.numel() != self.weight.shape[0]:
            return None
        if type(self).latent_weight is not CompressedLayer.latent_weight:
            return None
        if (self.output_axis, self.input_axis) != (0, 1):
            return None
        groups = None
        if mask is None and pattern is not None:
            if not isinstance(pattern, NMPattern) or self.slope_spec.order != 's_then_q':
                return None
            groups = Groups(pattern.n, pattern.m, math.prod(self.weight.shape[2:]))
        return Many(
            self.weight,
            step,
            mask if pattern is not None else None,
            self._codes,
            groups,
            self._grad_scale,
            self.slope_spec.gradient,
        )

    @property
    def _grad_scale(self) -> float:
        if self._codes is None or self.slope_step is None:
            return 1.0
        kept = self.weight.numel() * (self._pattern_now.density if self._pattern_now else 1.0)
        return grad_scale(kept / self.slope_step.numel(), self._codes)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes (int16) of the kept weights, of ``weight``'s shape; 0 where masked.

        Raises:
            TensorError: If the layer's weights are not quantized.
        """
        step = self.step
        if self._codes is None or step is None:
            raise TensorError('a layer with full-precision weights has no codes; set weight bits')
        integer = to_codes(self.latent_weight(), positive(step), self._codes).to(torch.int16)
        mask = self.mask
        return integer if mask is None else integer * mask

    # --- masks -------------------------------------------------------------------------------

    def hold_mask(self) -> None:
        """Fixes the mask to today's; from now on it is saved state."""
        self.slope_mask = self.live_mask()
        self._shared = None

    def release_mask(self) -> None:
        """Lets the mask follow W again."""
        self.slope_mask = None
        self._shared = None

    def set_pattern(self, pattern: Pattern | None) -> None:
        """Uses another pattern than the recipe's for a while (a ramp towards it)."""
        self._pattern_now = pattern
        self._shared = None

    def extra_repr(self) -> str:
        return ', '.join(filter(None, (super().extra_repr(), f'slope={self.slope_spec}')))
