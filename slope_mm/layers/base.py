"""What every compressed layer can do, whatever operator it computes.

A dense layer becomes a compressed one by swapping its class in place, so this mixin has no
``__init__`` of its own: :meth:`CompressedLayer.start_compression` adds the state. Stock state-dict
keys keep their stock meaning (``weight`` is the latent W); everything else starts with ``slope_``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope_mm.errors import CheckpointError, TensorError
from slope_mm.layers.activation import (
    UNCALIBRATED,
    ActivationObserver,
    QuantizedInput,
)
from slope_mm.layers.spec import LayerSpec
from slope_mm.ops import (
    SR_STE_DECAY,
    NMPattern,
    compress_weight,
    compress_with_powers,
    grad_scale,
    mse_init_step,
    positive,
    step_shape,
    to_codes,
)
from slope_mm.ops.sparsity import Pattern

_OWN_ATTRIBUTES = (
    'slope_spec',
    '_codes',
    '_pattern_now',
    '_step_ready',
    '_placeholder',
    '_act_state',
    '_shared',
    '_sharing',
    '_sums',
    '_observer',
    'runs',
    'loss_factor',
)
# What a copy starts without: the state of a running step or of a calibration.
_TRANSIENT = {'_shared': None, '_sharing': False, '_observer': None}


class SharedWeight(NamedTuple):
    """A compressed weight, and what it may be used for."""

    compressed: Tensor
    powers: Tensor
    sums: bool

    def serves(self, wants_grad: bool, sums: bool) -> bool:
        """Whether it has the graph and the sums that are asked for."""
        return (self.compressed.requires_grad or not wants_grad) and (self.sums or not sums)

    def outputs(self, wants_grad: bool) -> tuple[Tensor, Tensor]:
        """Compressed weight and sums, with their graph or without."""
        if wants_grad:
            return self.compressed, self.powers
        return self.compressed.detach(), self.powers.detach()


class CompressedLayer(QuantizedInput):
    """Mixin of a layer whose ``weight`` is masked and quantized before it is used.

    Class attributes:
        input_axis: Axis of ``weight`` that N:M groups run along (input channels).
        output_axis: Axis of ``weight`` that per-channel steps run along (output channels).

    State beside the stock one:
        slope_step: Parameter, learned weight steps, fp32, broadcastable to ``weight``.
        slope_act_step: Parameter of shape [1], learned activation step, fp32.
        slope_act_signed: Buffer, int8 of shape [1]: -1 uncalibrated, 0 unsigned, 1 signed.
        slope_mask: Buffer, bool of ``weight``'s shape; present only while the mask is held.
        slope_layer: Buffer, the spec as ASCII bytes, by which another recipe's checkpoint is told.
    """

    input_axis = 1
    output_axis = 0

    weight: Tensor
    slope_spec: LayerSpec
    slope_step: nn.Parameter | None
    slope_act_step: nn.Parameter | None
    slope_act_signed: Tensor
    slope_mask: Tensor | None

    def start_compression(self, spec: LayerSpec) -> None:
        """Adds the compression's state to a layer whose class was just swapped.

        The steps are placeholders until the first use or the first load: initialisers may still
        rewrite ``weight`` in place.
        """
        self.slope_spec = spec
        self._codes = spec.weight_codes
        self._pattern_now: Pattern | None = spec.pattern
        self._step_ready = False
        self._placeholder: Tensor | None = None
        self._act_state = UNCALIBRATED
        self._shared: SharedWeight | None = None
        self._sharing = False
        # Recomputation in a backward pass has to repeat what the forward did: outlives a scope.
        self._sums = True
        self._observer: ActivationObserver | None = None
        # How often the layer ran for training since it was last reset.
        self.runs = 0
        # What the training loop multiplies losses by (AMP scale over accumulated batches): the
        # part of SR-STE's gradient that is not a loss has to follow it.
        self.loss_factor = 1.0
        weight, trains = self.weight, self.weight.requires_grad
        self.register_parameter('slope_step', None)
        self.register_parameter('slope_act_step', None)
        if self._codes is not None:
            axis = self.output_axis if spec.step == 'channel' else None
            step = torch.ones(step_shape(tuple(weight.shape), axis), device=weight.device)
            # A frozen weight's step is frozen too, or DDP would wait for its gradient.
            self.slope_step = nn.Parameter(step, requires_grad=trains)
            self._await_initialisation()
        if spec.activation_bits is not None:
            step = torch.ones(1, device=weight.device)
            self.slope_act_step = nn.Parameter(step, requires_grad=trains)
            signed = torch.full((1,), UNCALIBRATED, dtype=torch.int8, device=weight.device)
            self.register_buffer('slope_act_signed', signed)
        self.register_buffer('slope_mask', None)
        text = torch.frombuffer(bytearray(spec.signature.encode()), dtype=torch.uint8)
        self.register_buffer('slope_layer', text.to(weight.device))

    def stop_compression(self) -> None:
        """Removes everything that :meth:`start_compression` added."""
        for store in (self._parameters, self._buffers):
            for key in [key for key in store if key.startswith('slope_')]:
                del store[key]
        for key in _OWN_ATTRIBUTES:
            self.__dict__.pop(key, None)

    # --- weight ------------------------------------------------------------------------------

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
        ranked = self.weight
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

    def _await_initialisation(self) -> None:
        """Marks the steps as they stand as placeholders, to be computed from ``weight``."""
        self._step_ready = False
        if self.slope_step is not None:
            self._placeholder = self.slope_step.detach().clone()

    def _initialise_placeholder(self) -> None:
        """Computes the steps, unless someone else (an average of models) has set them since."""
        step, placeholder = self.slope_step, self._placeholder
        if step is None or placeholder is None or not torch.equal(step, placeholder.to(step)):
            self._step_ready = True
            return
        self.initialise_step()
        self._await_initialisation()

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
        self.slope_step.copy_(mse_init_step(self.weight, self._codes, axis, mask))

    def compressed_weight(self) -> Tensor:
        """The weight that the layer computes with, differentiable in W and the step.

        Inside a sharing scope (a training step, an evaluation) it is computed once.

        Returns:
            Tensor of ``weight``'s shape and dtype.

        Raises:
            TensorError: If ``weight`` holds NaN or infinity (checked wherever that does not stall
                a GPU).
        """
        return self._compressed(sums=False)[0]

    def weight_powers(self) -> Tensor:
        """``w·w``, ``w·ŵ`` and ``ŵ·ŵ`` per output channel: all that the regularizers look at.

        Differentiable in W and the step with the exact gradient: the compressed weight is constant
        in W, and linear in the step.

        Returns:
            fp32 of shape ``[3, output channels]``.
        """
        return self._compressed(sums=True)[1]

    def _compressed(self, sums: bool) -> tuple[Tensor, Tensor]:
        wants_grad = torch.is_grad_enabled() and self.weight.requires_grad
        shared = self._shared if self._sharing else None
        if shared is not None and shared.serves(wants_grad, sums):
            return shared.outputs(wants_grad)
        sums = sums or (self._sums and wants_grad)
        pattern, mask = self._pattern_now, self.slope_mask
        fused = isinstance(pattern, NMPattern) and self.slope_spec.order == 's_then_q'
        finite = self.weight.device.type == 'cpu'
        if mask is None and not fused:
            mask = self.live_mask(check_finite=finite)
        with torch.autocast(self.weight.device.type, enabled=False):
            compressed, powers = compress_with_powers(
                self.weight,
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
        if self._sharing:
            self._shared = SharedWeight(compressed, powers, sums)
        return compressed, powers

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
        integer = to_codes(self.weight, positive(step), self._codes).to(torch.int16)
        mask = self.mask
        return integer if mask is None else integer * mask

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Scope in which the compressed weight is computed once. W must not change inside."""
        self.begin_sharing()
        try:
            yield
        finally:
            self.end_sharing()

    @property
    def sharing(self) -> bool:
        """Whether a sharing scope is open."""
        return self._sharing

    def begin_sharing(self, sums: bool = True, keep: bool = False) -> None:
        """Opens a sharing scope.

        Args:
            sums: Whether :meth:`weight_powers` will be asked for in training.
            keep: Go on with what an earlier scope kept; it has to be right still.
        """
        if not keep:
            self._shared = None
        self._sharing, self._sums = True, sums

    def end_sharing(self, keep: bool = False) -> None:
        """Closes the sharing scope and lets go of the compressed weight and its graph.

        Args:
            keep: Hold on to the weight for a scope that begins with ``keep``.
        """
        if not keep:
            self._shared = None
        self._sharing = False

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

    # --- state -------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self._step_ready:
            # Provisional: W may still be re-initialised before the first use.
            self._initialise_placeholder()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads stock and SLOPE checkpoints alike; what a stock one lacks is computed.

        Raises:
            CheckpointError: If the layer was compressed in another way when it was saved.
        """
        self._check_signature(state_dict.get(prefix + 'slope_layer'), prefix)
        has_weight = prefix + 'weight' in state_dict
        held = state_dict.get(prefix + 'slope_mask')
        if held is not None and held.shape == self.weight.shape and self.slope_spec.pattern:
            # A buffer of the right shape for the parent class to fill.
            self.slope_mask = torch.empty_like(self.weight, dtype=torch.bool)
        elif has_weight:
            # The mask belonged to another weight.
            self.slope_mask = None
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = prefix + 'slope_'
        missing_keys.extend(key for key in missing if not key.startswith(own))
        if prefix + 'slope_step' in state_dict:
            self._step_ready = True
        elif has_weight:
            self._await_initialisation()
        if self.slope_spec.activation_bits is not None:
            if prefix + 'slope_act_signed' in state_dict:
                self._act_state = int(self.slope_act_signed)
            elif has_weight:
                # Another network's activations: its range has to be found anew.
                self._act_state = UNCALIBRATED
                self.slope_act_signed.fill_(UNCALIBRATED)
        self._shared = None

    def _check_signature(self, saved: Tensor | None, prefix: str) -> None:
        if saved is None:
            return
        text = bytes(saved.to(device='cpu', dtype=torch.uint8).tolist()).decode('ascii', 'replace')
        if text != self.slope_spec.signature:
            raise CheckpointError(
                f"the checkpoint's layer '{prefix[:-1]}' was compressed as '{text}', but this"
                f" recipe says '{self.slope_spec.signature}'; use the recipe that it was trained"
                ' with, or start from the dense checkpoint'
            )

    def __getstate__(self) -> dict[str, Any]:
        # Non-leaf tensors of a running step can be neither copied nor pickled.
        state = self.__dict__.copy()
        state.update((name, value) for name, value in _TRANSIENT.items() if name in state)
        return state

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, slope={self.slope_spec}'


@contextmanager
def shared_weights(layers: Iterable[CompressedLayer]) -> Iterator[None]:
    """Scope in which every layer's compressed weight is computed once."""
    layers = list(layers)
    for layer in layers:
        layer.begin_sharing()
    try:
        yield
    finally:
        for layer in layers:
            layer.end_sharing()
