"""One config of the zoo: its dense twin, then the compressed one, and what is recorded of them."""

from __future__ import annotations

import copy
import math
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

import slope_mm
from slope_mm.convert import bake, compressed_layers, settled_layers
from slope_mm.engine.launch import build_model
from slope_mm.layers import find_weights
from slope_mm.zoo.catalogue import one_line
from slope_mm.zoo.configs import slope_config
from slope_mm.zoo.inputs import SIDES, prediction_batch, training_batch
from slope_mm.zoo.weights import shared_names, weight_shares

# A random model may be driven anywhere by its first step at full length.
LR_FACTOR = 1e-3
# Values of each layer's output that are compared.
SAMPLED = 64
# By detector or backbone, parameters that begin a hundred times smaller: random ones throw every
# box out of the image, where stock mmdet pastes no mask, or let deep sums grow beyond fp32.
QUIET = {
    'QueryInst': r'fc_reg\.weight$',
    'HRNet': r'^backbone\..*(\.bn[23]|fuse_layers\..*)\.weight$',
}


class DenseFailure(Exception):
    """The stock model itself does not build, train or predict here."""


def try_config(config: Config, note: Callable[..., None], pack: bool = True) -> None:
    """Runs both twins of a config and notes what comes out.

    Args:
        config: A prepared stock config.
        note: Called with key=value as soon as something is known, so that a process that is
            stopped has told what it knew.
        pack: Whether to write a packed file and read it back too.

    Raises:
        DenseFailure: If the stock model fails; everything else that is raised is the compressed
            model's.
    """
    dense, side, reached, state, shared = try_dense(config, note)
    with stage('slope', note):
        slope: BaseModel = build_model(slope_config(config))
        slope.load_state_dict(state, strict=True)
        del state
        note(shared=len(shared), shared_kept=shared == shared_names(slope))
        note(**weight_shares(dense, slope))
        loss, trained = train_step(slope, slope_config(config), side)
        note(slope_loss=loss, **gradients(slope, reached, trained))
        slope.zero_grad(set_to_none=True)
        finite = all(bool(p.isfinite().all()) for p in slope.parameters())
        note(finite=finite)
        predict(slope, config, side)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.slope' if pack else None
        with stage('bake', note):
            weights = check_bake(dense, slope, config, side, note, path)
        if path is not None:
            with stage('pack', note):
                check_packed(dense, path, weights, note)


def try_dense(
    config: Config, note: Callable[..., None]
) -> tuple[BaseModel, int, set[str], dict[str, Tensor], set[frozenset[str]]]:
    """Builds, trains and predicts with the stock model, at the first image size that it takes.

    Returns:
        The model, the images' side, the parameters that got a gradient, the initial state,
        and the groups of shared modules.

    Raises:
        DenseFailure: If it fails at every size; told is the last failure, which no size explains.
    """
    last: Exception | None = None
    for side in SIDES:
        try:
            with stage('dense', note):
                dense = build(config)
                # Some heads keep references to other modules once they have run.
                shared = shared_names(dense)
                note(params=sum(p.numel() for p in dense.parameters()), image=side)
                state = {key: value.clone() for key, value in dense.state_dict().items()}
                loss, reached = train_step(dense, config, side)
                note(dense_loss=loss)
                dense.zero_grad(set_to_none=True)
                predict(dense, config, side)
            return dense, side, reached, state, shared
        except Exception as error:
            last = error
            if not might_want_more(error):
                break
    raise DenseFailure(one_line(last)) from last  # type: ignore[arg-type]


def might_want_more(error: Exception) -> bool:
    """Whether an error may come from images that are too small, not from what is missing."""
    missing = (ImportError, NotImplementedError, FileNotFoundError, MemoryError)
    said = ('allocate memory', 'not found', 'not installed')
    return not isinstance(error, missing) and not any(text in str(error) for text in said)


@contextmanager
def stage(name: str, note: Callable[..., None]) -> Iterator[None]:
    """Times a part of a trial; ``stage`` is what a failed trial was doing."""
    note(stage=name)
    start = time.perf_counter()
    yield
    note(**{f'{name}_s': round(time.perf_counter() - start, 1)})


def build(config: Config) -> BaseModel:
    """Builds and initialises a model, always alike."""
    _seed()
    model: BaseModel = build_model(config)
    model.init_weights()
    section = config.model
    for kind in (section.get('arch', section.type), section.get('backbone', {}).get('type')):
        _quieten(model, QUIET.get(str(kind)))
    return model


@torch.no_grad()
def _quieten(model: nn.Module, names: str | None) -> None:
    for name, parameter in model.named_parameters() if names is not None else ():
        if re.search(str(names), name):
            parameter.mul_(0.01)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    # What mmengine's loops tell models that ask where training stands.
    hub = MessageHub.get_current_instance()
    for name in ('epoch', 'iter'):
        hub.update_info(name, 1)
    for name in ('max_epochs', 'max_iters'):
        hub.update_info(name, 100)


def train_step(model: BaseModel, config: Config, side: int) -> tuple[float, set[str]]:
    """One step as mmengine's loops do it.

    Returns:
        The loss, and the names of all parameters that got a gradient.
    """
    _seed()
    with DefaultScope.overwrite_default_scope(config.get('default_scope') or 'mmdet'):
        wrapper = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))
    for group in wrapper.optimizer.param_groups:
        group['lr'] *= LR_FACTOR
    reached: set[str] = set()
    step = wrapper.step

    def look_and_step(**options: Any) -> None:
        reached.update(name for name, p in model.named_parameters() if p.grad is not None)
        step(**options)

    # Not by hooks: torch 2.1 passes over some of the parameters', and over all of the optimizer's
    # once its compiler was imported.
    wrapper.step = look_and_step
    model.train()
    losses = model.train_step(training_batch(config, side), wrapper)
    return round(float(losses['loss'].detach()), 4), reached


@torch.no_grad()
def predict(model: BaseModel, config: Config, side: int) -> Any:
    """The model's prediction for one image or clip, in evaluation mode."""
    model.eval()
    _seed()
    return model.test_step(prediction_batch(config, side))


def gradients(model: nn.Module, reached: set[str], trained: set[str]) -> dict[str, Any]:
    """Which steps got no gradient although the dense twin's weight got one, and which cannot."""
    without: list[str] = []
    blank: list[str] = []
    steps = 0
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for weight in find_weights(model):
        if weight.layer is None or weight.key not in reached:
            continue
        own = {f'{weight.name}.{step}' for step in ('slope_step', 'slope_act_step')} & trainable
        steps += len(own)
        without += sorted(own - trained)
        act_step = f'{weight.name}.slope_act_step'
        if act_step in without and not weight.layer.calibrated:
            # An input of zeros alone says nothing about its range, and passes as it is.
            without.remove(act_step)
            blank.append(weight.name)
    return {'steps': steps, 'steps_without_gradient': without, 'inputs_of_zeros': blank}


# --- baking and packing --------------------------------------------------------------------------


def check_bake(
    dense: BaseModel,
    slope: BaseModel,
    config: Config,
    side: int,
    note: Callable[..., None],
    path: Path | None,
) -> dict[str, Tensor]:
    """Bakes, loads into the stock model with ``strict=True``, and compares what both put out.

    The comparison is about weights: the compressed model forgets its input ranges first, and
    passes inputs through as a stock model does. A model with weight-standardized convolutions,
    whose baked weights no stock layer can hold, is compared with its baked self.

    Args:
        dense: The stock model; has the compressed weights afterwards.
        slope: The compressed model; is baked afterwards.
        config: The stock config.
        side: Side of the images.
        note: Called with what is found.
        path: Where to write a packed file before baking; None writes none.

    Returns:
        The compressed weights by layer.
    """
    if path is not None:
        slope_mm.save_packed(slope, path)
    # Copies: mmcv's ConvAWS2d writes into its own tensors before it reads what it is given.
    state = slope.state_dict().items()
    kept = {key: x.clone() for key, x in state if '_act_' not in key.rpartition('.')[2]}
    slope.load_state_dict(kept, strict=True)
    layers = compressed_layers(slope)
    weights = {name: m.compressed_weight().detach().clone() for name, m in layers.items()}
    named = dict(dense.named_modules())
    names = [name for name in weights if name in named]
    ours = watch(slope, config, side, names)
    settled = settled_layers(slope)
    baked: BaseModel = bake(slope, inplace=True)
    if settled:
        note(settled=len(settled))
    else:
        dense.load_state_dict(baked.state_dict(), strict=True)
        baked = dense
    note(baked=difference(ours, watch(baked, config, side, names)))
    return weights


def check_packed(
    dense: BaseModel, path: Path, weights: dict[str, Tensor], note: Callable[..., None]
) -> None:
    """Reads a packed file into the stock model; its compressed weights have to be the same bits."""
    stock_bytes = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    size = path.stat().st_size
    note(packed_mb=round(size / 1e6, 2), ratio=round(stock_bytes / size, 1))
    slope_mm.load_packed(path, dense)
    read = compressed_layers(dense)
    same = read.keys() == weights.keys() and all(
        torch.equal(layer.compressed_weight(), weights[name]) for name, layer in read.items()
    )
    note(packed='equal' if same else 'differs')


def watch(
    model: BaseModel, config: Config, side: int, names: list[str]
) -> list[tuple[str, Tensor]]:
    """Samples of what the named layers and the whole model put out, in the order of their calls."""
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                seen.append((name, _sample(first)))

        return keep

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(hook(name)) for name in names]
    results = predict(model, config, side)
    for handle in hooks:
        handle.remove()
    seen.extend(('', _sample(tensor)) for tensor in _tensors(results))
    return seen


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLED)
    # One that a row's length divides would look at one column alone.
    while math.gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat[::stride].double().clone()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value.astype(np.float64))
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, 'items') and hasattr(value, 'all_items'):
        for _, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            yield from _tensors(item)


def difference(ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> Any:
    """``'equal'``, or the largest difference relative to the largest value, and where.

    Outputs that are not finite say nothing, and neither do none: both are told instead.
    """
    # Attention and its like use weights of layers that they do not call, or not in both forms.
    both = {name for name, _ in ours} & {name for name, _ in theirs}
    ours, theirs = ([(n, x) for n, x in seen if n in both] for seen in (ours, theirs))
    if [n for n, _ in ours] != [n for n, _ in theirs]:
        return f'{len(ours)} outputs against {len(theirs)}'
    if not any(x.numel() for _, x in ours):
        return 'nothing compared'
    broken = sum(
        not bool((a.isfinite() & b.isfinite()).all())
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
        if a.shape == b.shape
    )
    if broken:
        return f'not finite in {broken} of {len(ours)} outputs'
    worst, where = 0.0, ''
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return f"shapes differ at '{name or 'the result'}'"
        size = float(a.abs().max()) if a.numel() else 0.0
        moved = float((a - b).abs().max()) if a.numel() else 0.0
        if moved / max(size, 1e-12) > worst and moved > 0:
            worst, where = moved / max(size, 1e-12), name
    return 'equal' if worst == 0 else f"{worst:.1e} at '{where or 'the result'}'"


def peak_mb() -> int:
    """Peak of this process's memory so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return math.ceil(peak / (1e6 if sys.platform == 'darwin' else 1e3))
