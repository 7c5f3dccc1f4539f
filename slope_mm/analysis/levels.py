"""Layers that run several times in one forward: a head that a feature pyramid shares.

Such a layer has one input step, which has to serve every level. Here each run of it is looked at by
itself: how well that step fits the level's values, and how well a step of the level's own would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.layers import CompressedLayer
from slope_mm.layers.activation import (
    SIGNED,
    UNSIGNED,
    ActivationObserver,
    calibrated_step,
    first_input,
    quantize_activation,
)
from slope_mm.ops import activation_codes, sqnr_db


@dataclass(frozen=True)
class LevelStep:
    """One run of a layer within a forward.

    Attributes:
        layer: Qualified name.
        level: Which run, from 0.
        step: The step of least squared error on this run's inputs alone.
        signed: Whether they take negative values.
        one_db: SQNR in dB of the inputs under the step that serves all runs.
        own_db: SQNR in dB of the inputs under ``step``.
    """

    layer: str
    level: int
    step: float
    signed: bool
    one_db: float
    own_db: float


@contextmanager
def each_run(
    model: nn.Module, act: Callable[[str, CompressedLayer, int, Tensor], None]
) -> Iterator[None]:
    """Scope in which ``act(name, layer, number, input)`` is called before each run of a layer.

    Args:
        model: A compressed model; runs are numbered from 0 in each of its forwards.
        act: What to do; layers with several inputs (attention) are passed over.
    """
    counts: dict[str, int] = {}

    def begin(model: nn.Module, args: tuple[Any, ...]) -> None:
        counts.clear()

    def watch(name: str) -> Callable[..., None]:
        def run(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = counts.get(name, 0)
            counts[name] = number + 1
            act(name, layer, number, first_input(args, kwargs))

        return run

    layers = {n: x for n, x in compressed_layers(model).items() if x.inputs == 1}
    handles = [model.register_forward_pre_hook(begin)]
    handles += [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def level_steps(model: nn.Module, forwards: Sequence[Callable[[], Any]]) -> list[LevelStep]:
    """Compares one input step with one a level, for every layer that runs several times.

    All inputs pass unquantized meanwhile, so each layer is judged alone.

    Args:
        model: A calibrated model.
        forwards: Each runs the model on some images.

    Returns:
        One entry per layer and run, in the order of the layers; those with one run a forward, and
        those whose input is not quantized, have none.
    """
    seen: dict[str, dict[int, ActivationObserver]] = {}

    def observe(name: str, layer: CompressedLayer, level: int, x: Tensor) -> None:
        if layer.slope_spec.activation_bits is not None and layer.calibrated:
            seen.setdefault(name, {}).setdefault(level, ActivationObserver()).observe(x)

    layers = compressed_layers(model)
    for layer in layers.values():
        layer.begin_observing()
    try:
        with each_run(model, observe):
            for forward in forwards:
                forward()
    finally:
        for layer in layers.values():
            layer.end_observing()
    found = []
    for name, levels in seen.items():
        if len(levels) < 2:
            continue
        for level, observer in sorted(levels.items()):
            if observer.seen:
                found.append(_level(name, layers[name], level, observer))
    return found


def _level(
    name: str, layer: CompressedLayer, level: int, observer: ActivationObserver
) -> LevelStep:
    bits, one = layer.slope_spec.activation_bits, layer.slope_act_step
    assert bits is not None and one is not None
    values = torch.cat(observer.samples)
    signed = bool(observer.low < 0)  # type: ignore[operator]
    step = calibrated_step(values, signed, bits)
    under = {
        'one': quantize_activation(
            values[None], one, activation_codes(bits, bool(layer.activation_signed))
        ),
        'own': quantize_activation(values[None], step, activation_codes(bits, signed)),
    }
    db = {key: float(sqnr_db(values, x[0])) for key, x in under.items()}
    return LevelStep(name, level, float(step), signed, db['one'], db['own'])


@contextmanager
def own_steps(model: nn.Module, steps: Sequence[LevelStep]) -> Iterator[None]:
    """Scope in which each level of a layer is quantized with its own step.

    Args:
        model: The compressed model, not trained meanwhile.
        steps: From :func:`level_steps`.
    """
    known: Mapping[tuple[str, int], LevelStep] = {(s.layer, s.level): s for s in steps}
    names = {s.layer for s in steps}
    layers = compressed_layers(model)
    before = {
        n: (layers[n].slope_act_step.detach().clone(), list(layers[n]._act_states))  # type: ignore[union-attr]
        for n in names
    }

    @torch.no_grad()
    def use(name: str, layer: CompressedLayer, level: int, x: Tensor) -> None:
        found = known.get((name, level))
        if found is not None and layer.slope_act_step is not None:
            layer.slope_act_step.fill_(found.step)
            layer._act_states[0] = SIGNED if found.signed else UNSIGNED

    try:
        with each_run(model, use):
            yield
    finally:
        with torch.no_grad():
            for name, (step, states) in before.items():
                layers[name].slope_act_step.copy_(step)  # type: ignore[union-attr]
                layers[name]._act_states = states
