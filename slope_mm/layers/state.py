"""State dicts of compressed layers: what is saved beside the stock keys, and what loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.errors import CheckpointError
from slope_mm.layers.activation import UNCALIBRATED, QuantizedInput
from slope_mm.layers.sharing import SharedWeightScope
from slope_mm.layers.spec import LayerSpec

# What a copy starts without: the state of a running step or of a calibration.
_TRANSIENT: dict[str, Any] = {
    '_many': None,
    '_shared': None,
    '_sharing': False,
    '_room': None,
    '_observers': [],
}


def shape_in(state_dict: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """The shape of what a state dict has under a key; None where it has nothing."""
    return tuple(getattr(state_dict[key], 'shape', ())) if key in state_dict else None


class SavedState(SharedWeightScope, QuantizedInput):
    """The part of a compressed layer that saves and loads its state.

    Steps are placeholders until the first use or the first load: initialisers may still rewrite
    ``weight`` in place.
    """

    weight: Tensor
    slope_spec: LayerSpec
    slope_step: nn.Parameter | None
    slope_mask: Tensor | None
    slope_layer: Tensor
    _step_ready: bool
    _placeholder: Tensor | None

    def initialise_step(self) -> None:
        """Sets the weight steps to those of least squared error."""
        raise NotImplementedError

    def first_state(self, device: torch.device) -> dict[str, Tensor]:
        """What the layer adds to the state dict, as it is before anything is known."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As the module's, but ``half()`` and its like leave steps in fp32.

        Rounded to 8 or 11 bits they would give other levels, and other codes.
        """
        before = {key: step.data for key, step in self._steps_of_fp32()}
        super()._apply(fn, recurse)
        for key, step in before.items():
            now = self._parameters[key]
            if now is not None and now.dtype in (torch.float16, torch.bfloat16):
                now.data = step.to(now.device)
        return self

    def _steps_of_fp32(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key in ('slope_step', 'slope_act_step'):
            step = self._parameters.get(key)
            if step is not None and step.dtype == torch.float32:
                yield key, step

    def _make_real(self) -> None:
        """Gives a layer that was built on ``meta`` what a stock checkpoint did not bring."""
        if self.weight.is_meta or not self.slope_layer.is_meta:
            return
        for key, value in self.first_state(self.weight.device).items():
            parameter = self._parameters.get(key)
            if parameter is None:
                self._buffers[key] = value
            elif parameter.is_meta:
                self._parameters[key] = nn.Parameter(value, parameter.requires_grad)

    @torch.no_grad()
    def _begin_again(self, state_dict: dict[str, Any], own: str) -> None:
        """Beside another weight: own state that did not come with it is as it was at first.

        It may be what memory held, in a model that was built on ``meta`` and given room.
        """
        for key, value in self.first_state(self.weight.device).items():
            if own + key.removeprefix('slope_') not in state_dict:
                getattr(self, key).copy_(value)

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

    def _coming_shape(self, state_dict: dict[str, Any], prefix: str) -> tuple[int, ...] | None:
        """The shape of the layer's weight in the state dict that is being loaded; None without."""
        return shape_in(state_dict, prefix + 'weight')

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
        coming = self._coming_shape(state_dict, prefix)
        # A head for other classes is not loaded, but for those of its tensors that happen to fit.
        has_weight = coming == tuple(self.weight.shape)
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
        self._make_real()
        own = prefix + 'slope_'
        missing_keys.extend(key for key in missing if not key.startswith(own))
        if has_weight:
            self._begin_again(state_dict, own)
        step, saved = self.slope_step, shape_in(state_dict, prefix + 'slope_step')
        step_comes = saved is not None and step is not None and saved == tuple(step.shape)
        if step_comes and (has_weight or coming is None):
            self._step_ready = True
        elif has_weight or step_comes:
            self._await_initialisation()
        if self.slope_spec.activation_bits is not None:
            if prefix + 'slope_act_signed' in state_dict:
                self._act_states = self.slope_act_signed.tolist()
            elif has_weight:
                # Another network's activations: its range has to be found anew.
                self._act_states = [UNCALIBRATED] * self.inputs
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
        state.update((name, copy(value)) for name, value in _TRANSIENT.items() if name in state)
        return state
