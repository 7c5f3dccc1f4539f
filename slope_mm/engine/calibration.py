"""Finding the range and sign of every quantized input, equal on all ranks."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather, get_world_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from slope_mm.convert import compressed_layers
from slope_mm.errors import DataError
from slope_mm.layers import CompressedLayer
from slope_mm.layers.activation import MAX_SAMPLES


def uncalibrated_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers whose input quantizer has no range yet."""
    return {n: layer for n, layer in compressed_layers(model).items() if not layer.calibrated}


SavedBuffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def saved_buffers(model: nn.Module) -> SavedBuffers:
    """Copies of all buffers but compression's own."""
    return [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and not key.startswith('slope_')
    ]


@torch.no_grad()
def restore_buffers(saved: SavedBuffers) -> None:
    """Brings back what :func:`saved_buffers` copied, in the very tensors that it was in."""
    for module, key, buffer, value in saved:
        buffer.copy_(value)
        module._buffers[key] = buffer


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Scope after which all buffers and random states are exactly what they were.

    Norms' statistics, that is, and what losses and hooks count; not what compression calibrates.
    """
    buffers = saved_buffers(model)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        restore_buffers(buffers)


@contextmanager
def observing(model: nn.Module) -> Iterator[dict[str, CompressedLayer]]:
    """Scope in which the uncalibrated layers of a model watch their inputs.

    Their inputs pass unquantized meanwhile; calibrated layers go on quantizing. At the end the
    ranges are pooled over all ranks and set.

    Yields:
        The layers that watch.
    """
    layers = uncalibrated_layers(model)
    for layer in layers.values():
        layer.begin_observing()
    try:
        yield layers
    except BaseException:
        for layer in layers.values():
            layer.end_observing()
        raise
    _set_ranges(list(layers.values()))


def _set_ranges(layers: list[CompressedLayer]) -> None:
    """Pools what every rank saw, so that all ranks set the same steps."""
    for layer in layers:
        for which, observer in enumerate(layer.end_observing()):
            # One fixed-size message an input: lowest value, number of samples, samples.
            message = torch.zeros(MAX_SAMPLES + 2, device=layer.weight.device)
            message[0] = float('inf')
            if observer.low is not None:
                samples = torch.cat(observer.samples)[:MAX_SAMPLES]
                message[0], message[1] = observer.low, samples.numel()
                message[2 : 2 + samples.numel()] = samples
            messages = all_gather(message) if get_world_size() > 1 else [message]
            pooled = torch.cat([m[2 : 2 + int(m[1])] for m in messages])
            if pooled.numel():
                lowest = min(float(m[0]) for m in messages)
                layer.set_activation_range(pooled, signed=lowest < 0, which=which)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Calibrates the input quantizers of an mmengine model on batches of its training data.

    The model runs its loss forward, in the mode that it is in; BN statistics and random states
    are left as found. Layers that are calibrated already stay as they are.

    Args:
        model: A compressed mmengine model (not wrapped).
        batches: Collated batches, as its dataloader gives them.

    Returns:
        The number of layers that were calibrated.
    """
    before = len(uncalibrated_layers(model))
    if not before:
        return 0
    detector: Any = model
    with undisturbed(model), observing(model):
        for batch in batches:
            data = detector.data_preprocessor(batch, True)
            detector._run_forward(data, mode='loss')
    return before - len(uncalibrated_layers(model))


def evenly_spread_batches(
    loader: DataLoader, batches: int, rank: int = 0, world: int = 1
) -> Iterator[Any]:
    """Batches of images spread evenly over a data set, past the loader's own order.

    Args:
        loader: A dataloader; its data set, batch size and collation are used.
        batches: Batches of this rank.
        rank: Whose batches; every rank gets others.
        world: Number of ranks.

    Yields:
        Collated batches.

    Raises:
        DataError: If the data set is empty, or an image cannot be used; it is named.
    """
    # A loader with a batch sampler of its own has no batch size.
    batch_size: Any = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    size = int(batch_size)
    dataset: Any = loader.dataset
    wanted, length = batches * size * world, len(dataset)
    if not length:
        raise DataError(
            'calibration: the training data set is empty; check its annotation file, its classes'
            ' (metainfo) and its filter_cfg'
        )
    for batch in range(batches):
        first = (batch * world + rank) * size
        indices = [(first + i) * length // wanted % length for i in range(size)]
        yield loader.collate_fn([_item(dataset, index) for index in indices])


def _item(dataset: Any, index: int) -> Any:
    """An item of a data set; what it raises comes back with the image's name."""
    try:
        return dataset[index]
    except Exception as error:
        info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
        name = info.get('img_path', f'item {index}')
        reason = str(error).strip().splitlines() or ['no reason given']
        raise DataError(
            f"calibration: '{name}' of the training data cannot be used"
            f' ({type(error).__name__}: {reason[-1][:200]}); mend it, or take it out of the'
            ' annotation file'
        ) from error


class FirstBatchCalibration:
    """A forward pre-hook: calibrates what no hook calibrated, on the first training batch.

    It runs inside DDP on every rank alike. A layer that the first batch did not reach (no
    foreground) gets more chances: in each of the next iterations, then ever more rarely.
    """

    # A baked model does without.
    of_compression = True

    def __init__(self) -> None:
        self.iteration = 0
        self.done = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.done or not is_training_forward(model, args, kwargs):
            return
        self.iteration += 1
        self.done = not uncalibrated_layers(model)
        # Every time up to 10, then at powers of two: a layer that never runs costs next to nothing.
        if self.done or (self.iteration > 10 and self.iteration & (self.iteration - 1)):
            return
        # Heads may write into the data samples.
        args, kwargs = copied_samples(args), copied_samples(kwargs)
        with undisturbed(model), observing(model):
            model.forward(*args, **kwargs)
        # Older torch would hand autocast's copies of this forward to the next, which have no graph.
        torch.clear_autocast_cache()


def is_training_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether mmengine is about to compute a loss that will be trained on."""
    mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
    return model.training and torch.is_grad_enabled() and mode == 'loss'


def copied_samples(container: Any) -> Any:
    """A batch whose data samples are copies: heads may write into them. Tensors are shared."""
    if isinstance(container, dict):
        return {key: copied_samples(value) for key, value in container.items()}
    if isinstance(container, tuple) and hasattr(container, '_fields'):
        return type(container)(*map(copied_samples, container))
    if isinstance(container, (list, tuple)):
        return type(container)(copied_samples(value) for value in container)
    return container if isinstance(container, (Tensor, str)) else copy.deepcopy(container)
