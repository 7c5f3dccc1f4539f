"""Where NaN and infinity are: in batches, activations, gradients, weights and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slope_mm.convert import compressed_layers
from slope_mm.errors import TensorError

NAMED = 3  # how many culprits a message names


def plain(model: nn.Module) -> nn.Module:
    """The model without the wrapper of distributed training."""
    inner = model.module if is_model_wrapper(model) else model
    assert isinstance(inner, nn.Module)
    return inner


def all_finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and infinity.

    Args:
        tensors: Floating tensors of one device and any shape.
    """
    # A sum is one pass without a temporary; it may overflow on finite values, hence the recheck.
    sums = torch.stack([tensor.sum().float() for tensor in tensors]).isfinite().tolist()
    return [
        fine or bool(tensor.isfinite().all()) for tensor, fine in zip(tensors, sums, strict=True)
    ]


def nonfinite(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; None, empty and integer ones hold none.

    On a GPU one synchronisation a device, however many tensors there are.
    """
    found = []
    groups: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        if tensor is not None and tensor.is_floating_point() and tensor.numel():
            groups.setdefault(tensor.device, []).append((name, tensor.detach()))
    for group in groups.values():
        good = all_finite([tensor for _, tensor in group])
        found += [name for (name, _), fine in zip(group, good, strict=True) if not fine]
    return found


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return ', '.join(names[:NAMED]) + more


# --- checkpoints ---------------------------------------------------------------------------------


def check_state_finite(model: nn.Module, state: Mapping[str, Any], what: str, advice: str) -> None:
    """Refuses a state dict whose weights, steps or statistics are NaN or infinite.

    Other buffers may be infinite on purpose (masks of attention).

    Args:
        model: The model that it is for.
        state: Tensors by name; ``module.`` prefixes are ignored.
        what: What is refused, as the message begins.
        advice: How it ends.

    Raises:
        TensorError: Names them.
    """
    trained = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase):
            trained |= {f'{prefix}.running_mean', f'{prefix}.running_var'}
    tensors = ((key.removeprefix('module.'), value) for key, value in state.items())
    names = nonfinite((k, v) for k, v in tensors if k in trained and isinstance(v, Tensor))
    if names:
        raise TensorError(f'{what} holds NaN or infinity in {listed(names)}; {advice}')


def check_checkpoint_finite(runner: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuses to save a compressed model that is not finite; dense ones are their owner's affair.

    Raises:
        TensorError: Names the tensors. What was saved before is unchanged.
    """
    model = plain(runner.model)
    if not compressed_layers(model):
        return
    for key in ('state_dict', 'ema_state_dict'):
        check_state_finite(
            model,
            checkpoint.get(key) or {},
            f'the {key} of iteration {runner.iter + 1}',
            'it is not saved. Go on from the checkpoint before it, with a lower learning rate or'
            " SlopeFiniteHook(action='skip')",
        )


# --- batches -------------------------------------------------------------------------------------


def tensors_of(container: Any, path: str = '') -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, sequences and data samples, with its path."""
    if isinstance(container, Tensor):
        yield path, container
    elif isinstance(container, Mapping):
        for key, value in container.items():
            yield from tensors_of(value, f'{path}.{key}' if path else str(key))
    elif isinstance(container, (list, tuple)):
        for index, value in enumerate(container):
            yield from tensors_of(value, f'{path}[{index}]')
    elif isinstance(container, BaseDataElement):
        for key, value in container.items():
            yield from tensors_of(value, f'{path}.{key}' if path else str(key))
    elif isinstance(getattr(container, 'tensor', None), Tensor):  # mmdet's boxes
        yield path, container.tensor


def nonfinite_data(batch: Any) -> str | None:
    """Names the images and labels of a batch that hold NaN or infinity, or None."""
    names = nonfinite(tensors_of(batch))
    if not names:
        return None
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    files = []
    for index, sample in enumerate(samples if isinstance(samples, (list, tuple)) else ()):
        if any(f'[{index}]' in name for name in names) and hasattr(sample, 'img_path'):
            files.append(str(sample.img_path))
    where = f' ({listed(files)})' if files else ''
    return f'the batch holds NaN or infinity in {listed(names)}{where}'


# --- activations ---------------------------------------------------------------------------------


class ActivationTrace:
    """Watches what goes into and comes out of every layer, in the order in which they run.

    Nothing is asked of a GPU before :meth:`first`.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[ActivationTrace]:
        """Scope in which the model is watched."""
        handles = self.attach(model)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, model: nn.Module) -> list[Any]:
        """Begins to watch; whoever calls removes the handles."""
        handles = []
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                hook = self._hook(name or type(module).__name__)
                handles.append(module.register_forward_hook(hook))
        return handles

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            self._note(f'the input of {name}', inputs)
            self._note(f'the output of {name}, whose input is finite', output)

        return look

    def _note(self, what: str, container: Any) -> None:
        for _, tensor in tensors_of(container):
            if tensor.is_floating_point():
                self._seen.append((what, tensor.detach().isfinite().all()))

    def first(self) -> str | None:
        """Where NaN or infinity came up first, or None."""
        if not self._seen:
            return None
        device = self._seen[0][1].device
        good = torch.stack([fine.to(device) for _, fine in self._seen]).tolist()
        return next(
            (what for (what, _), fine in zip(self._seen, good, strict=True) if not fine), None
        )
