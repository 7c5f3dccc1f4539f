"""Writes a compressed model as a packed file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slope_mm.errors import PackedFileError
from slope_mm.layers import CompressedLayer, find_weights
from slope_mm.layers.standardized import StandardizedWeight
from slope_mm.layers.ties import compressed_ties
from slope_mm.ops import NMPattern, positive, to_codes
from slope_mm.packing.codec import encode_weight
from slope_mm.packing.container import (
    HEADER_CRC,
    METADATA_KEY,
    checksums,
    sign_header,
    to_text,
    write_atomically,
)
from slope_mm.packing.layout import (
    CODINGS,
    LARGEST_STEP,
    InputQuantizer,
    WeightLayout,
    shared_values,
)
from slope_mm.packing.plainconfig import to_plain
from slope_mm.packing.reader import weight_key
from slope_mm.version import __version__

#: Besides the codings of the format: per layer the smaller of ``entropy`` and ``enumerative``.
SMALLEST = 'smallest'
#: What the header tells of itself, and ``meta`` cannot.
RESERVED = {
    'version',
    'writer',
    'recipe',
    'layer_defaults',
    'layers',
    'constants',
    'narrowed',
    'aliases',
    'crc32',
}
HALF_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
DTYPE_NAMES = {
    torch.float64: 'F64',
    torch.float32: 'F32',
    torch.float16: 'F16',
    torch.bfloat16: 'BF16',
    torch.int64: 'I64',
    torch.int32: 'I32',
    torch.int16: 'I16',
    torch.int8: 'I8',
    torch.uint8: 'U8',
    torch.bool: 'BOOL',
}


@torch.no_grad()
def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    meta: Mapping[str, Any] | None = None,
    *,
    coding: str = SMALLEST,
    dtype: str | None = None,
) -> int:
    """Writes a compressed model's packed file (docs/format.md).

    The model is left as it is. What it computes in evaluation is what the file holds: codes, masks
    and steps of its weights, the steps and signs of its input quantizers, everything else as it is.

    Args:
        model: A compressed model, on any device; DDP's and torch.compile's wrappers are taken off.
        path: The file to write; what stands there is replaced once the new one is complete.
        meta: What the header tells beside, as JSON can: ``config`` (the stock model's config, from
            which ``slope_mm.load_packed(path)`` builds it; a SlopeModel knows its model section),
            ``dataset_meta`` (class names; taken from ``model.dataset_meta`` where that exists), and
            anything of your own.
        coding: ``'bitmask'``, ``'enumerative'``, ``'entropy'``, or for each layer the smaller of
            the last two.
        dtype: ``'float16'`` or ``'bfloat16'`` stores steps, biases, BN and all that is not
            compressed in half the bytes, but for tensors that the type cannot hold: values that
            overflow or become zero, and steps that lose digits.

    Returns:
        The file's length in bytes.

    Raises:
        PackedFileError: If nothing is compressed, an option is unknown, a weight is tied to a layer
            that computes with another, or the file cannot be written.
    """
    content = pack(model, meta, coding=coding, dtype=dtype)
    write_atomically(path, content)
    return len(content)


def check_options(coding: str, dtype: str | None) -> None:
    """Refuses options that :func:`save_packed` does not know.

    Raises:
        PackedFileError: Names the option and its choices.
    """
    if coding not in (SMALLEST, *CODINGS):
        raise PackedFileError(f'coding={coding!r} is unknown; choose one of {[SMALLEST, *CODINGS]}')
    if dtype is not None and dtype not in HALF_DTYPES:
        raise PackedFileError(
            f'dtype={dtype!r} is unknown; choose one of {sorted(HALF_DTYPES)}, or None'
        )


@torch.no_grad()
def pack(
    model: nn.Module,
    meta: Mapping[str, Any] | None = None,
    *,
    coding: str = SMALLEST,
    dtype: str | None = None,
) -> bytearray:
    """The content of the file that :func:`save_packed` writes."""
    check_options(coding, dtype)
    model = unwrapped(model)
    layers = {w.name: w.layer for w in find_weights(model) if w.layer is not None}
    keys = {w.name: w.key for w in find_weights(model) if w.layer is not None}
    if not layers:
        raise PackedFileError(
            'the model has no compressed layers to pack; give one that slope_mm converted, before'
            ' it is baked'
        )
    _refuse_ties(model)
    half = None if dtype is None else HALF_DTYPES[dtype]
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, WeightLayout] = {}
    for name, layer in layers.items():
        _refuse_what_no_file_holds(name, layer)
        layout, tensors[keys[name]] = _encode_layer(layer, coding, half)
        usual = weight_key(name, None)
        layouts[name] = replace(layout, key=None if keys[name] == usual else keys[name])
    defaults = shared_values(layouts.values())
    constants: dict[str, Any] = {}
    narrowed: dict[str, str] = {}
    plain, aliases = _plain_tensors(model, layers, keys)
    for key, tensor in plain.items():
        constant = _constant(tensor)
        if constant is not None:
            constants[key] = constant
        elif _is_narrow(tensor):
            narrowed[key] = DTYPE_NAMES[tensor.dtype]
            tensors[key] = tensor.to(torch.int8)
        else:
            tensors[key] = _halved(tensor, half)
    header = {
        'version': max(layout.version for layout in layouts.values()),
        'writer': f'slope_mm {__version__}',
        **_described(model, meta),
        'layer_defaults': defaults,
        'layers': {name: layout.to_json(defaults) for name, layout in layouts.items()},
        'constants': constants,
        'narrowed': narrowed,
        'aliases': aliases,
    }
    return _serialise(header, tensors)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without DDP's and torch.compile's wrappers."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    # torch.compile's.
    return getattr(model, '_orig_mod', model)


def _described(model: nn.Module, meta: Mapping[str, Any] | None) -> dict[str, Any]:
    recipe = getattr(model, 'slope_recipe', None)
    told: dict[str, Any] = {'recipe': None if recipe is None else recipe.to_dict()}
    stock_model = getattr(model, 'slope_config', None)
    if stock_model is not None:
        told['config'] = {'model': stock_model}
    if getattr(model, 'dataset_meta', None) is not None:
        told['dataset_meta'] = model.dataset_meta
    given = dict(meta or {})
    reserved = given.keys() & RESERVED
    if reserved:
        raise PackedFileError(
            f"meta has the key '{min(reserved)}', which the header itself uses; rename it"
        )
    return {key: to_plain(value, f'meta[{key!r}]') for key, value in (told | given).items()}


def _serialise(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytearray:
    header['crc32'] = checksums({key: _bytes(tensor) for key, tensor in tensors.items()})
    stored = {**tensors, HEADER_CRC: torch.zeros(4, dtype=torch.uint8)}
    content = bytearray(safetensors.torch.save(stored, {METADATA_KEY: to_text(header)}))
    sign_header(content)
    return content


# --- one layer -----------------------------------------------------------------------------------


def _refuse_what_no_file_holds(name: str, layer: CompressedLayer) -> None:
    """Refuses a layer that a reader would refuse, or that would come back as another one."""
    weight, step = layer.latent_weight(), layer.step
    if not bool(torch.isfinite(weight).all()):
        raise PackedFileError(
            f"layer '{name}' has NaN or infinity in its weight, for which there are no codes; go"
            ' back to a checkpoint that is finite'
        )
    for what, steps in (('weight', step), ('input', layer.slope_act_step)):
        # What is NaN is not below.
        if steps is not None and not bool((positive(steps) < LARGEST_STEP).all()):
            raise PackedFileError(
                f"layer '{name}': a step of its {what} is NaN or not below {LARGEST_STEP:g}; go"
                ' back to a checkpoint that is finite'
            )


def _encode_layer(
    layer: CompressedLayer, coding: str, half: torch.dtype | None
) -> tuple[WeightLayout, Tensor]:
    spec, mask = layer.slope_spec, layer.mask
    codes = spec.weight_codes
    step = None
    weight = layer.latent_weight().detach()
    quantizers = _input_quantizers(layer)
    kept = weight.numel() if mask is None else int(mask.sum())
    layout = WeightLayout(
        shape=tuple(weight.shape),
        axis=layer.input_axis,
        output_axis=layer.output_axis,
        kept=kept,
        coding=CODINGS[1] if coding == SMALLEST else coding,
        dtype=DTYPE_NAMES[weight.dtype],
        pattern=None if spec.pattern is None else spec.pattern.name,
        step=spec.step,
        gradient=spec.gradient,
        order=spec.order,
        note=spec.note,
        held=layer.slope_mask is not None,
        standardized=isinstance(layer, StandardizedWeight),
        input=quantizers[0] if len(quantizers) == 1 else None,
        inputs=quantizers if len(quantizers) > 1 else (),
    )
    if codes is not None and layer.step is not None:
        step = positive(layer.step)
        values = to_codes(weight, step, codes).to(torch.int8)
        step = _halved(step.cpu(), half, is_step=True)
        layout = replace(
            layout,
            bits=codes.bits,
            codes=spec.codes,
            qn=codes.qn,
            qp=codes.qp,
            offset=codes.offset,
            step_dtype=DTYPE_NAMES[step.dtype],
        )
    else:
        values = _halved(weight.detach(), half)
        layout = replace(layout, dtype=DTYPE_NAMES[values.dtype])
    kept_here = None if mask is None or not layout.sparse else mask.cpu().numpy()
    if kept_here is not None and isinstance(spec.pattern, NMPattern):
        layout = _in_groups(layout, spec.pattern, kept_here)
    steps = None if step is None else _numpy(step).reshape(-1)
    found, payload = _smallest(layout, _numpy(values), kept_here, steps, coding)
    return found, torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _smallest(
    layout: WeightLayout,
    values: NDArray,
    mask: NDArray[np.bool_] | None,
    steps: NDArray | None,
    coding: str,
) -> tuple[WeightLayout, NDArray[np.uint8]]:
    if coding == SMALLEST:
        found, payload = encode_weight(replace(layout, coding='entropy'), values, mask, steps)
        fixed = (layout.fixed_index_bytes() or 0) + (layout.fixed_code_bytes() or 0)
        if payload.size < layout.step_bytes + fixed:
            return found, payload
    return encode_weight(layout, values, mask, steps)


def _in_groups(layout: WeightLayout, pattern: NMPattern, mask: NDArray[np.bool_]) -> WeightLayout:
    """With its groups, if the mask holds the pattern: on a ramp towards it, it does not yet."""
    groups = np.moveaxis(mask, layout.axis, -1).reshape(-1, pattern.m)
    if np.any(groups.sum(1, dtype=np.uint8) != pattern.n):
        return layout
    return replace(layout, n=pattern.n, m=pattern.m)


def _input_quantizers(layer: CompressedLayer) -> tuple[InputQuantizer, ...]:
    bits = layer.slope_spec.activation_bits
    if bits is None or layer.slope_act_step is None:
        return ()
    return tuple(
        InputQuantizer(bits, layer.input_signed(which), float(step))
        for which, step in enumerate(positive(layer.slope_act_step))
    )


# --- everything else -----------------------------------------------------------------------------


def _plain_tensors(
    model: nn.Module, layers: Mapping[str, CompressedLayer], keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is not compressed, by its stock key, and the further keys of what is shared."""
    first: dict[int, str] = {id(layer.weight): keys[name] for name, layer in layers.items()}
    weights = set(keys.values())
    plain: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        owner, _, parameter = key.rpartition('.')
        if parameter.startswith('slope_') and _is_compressed(model, owner):
            continue
        if not isinstance(value, Tensor) or value.dtype not in DTYPE_NAMES:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise PackedFileError(
                f"'{key}' is {found}, which a packed file cannot hold: it takes tensors of"
                f' {", ".join(sorted(DTYPE_NAMES.values()))}; register it with persistent=False, or'
                ' keep it as one of those'
            )
        known = first.setdefault(id(value), key)
        if known == key:
            if key not in weights:
                plain[key] = _apart(value, storages)
            continue
        aliases[key] = known
    return plain, aliases


def _is_compressed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), CompressedLayer)


def _apart(value: Tensor, storages: set[int]) -> Tensor:
    """A tensor that safetensors takes: without gaps, in memory that none of the others lies in."""
    tensor = value.detach().cpu().contiguous()
    place = tensor.untyped_storage().data_ptr()
    if place in storages:
        return tensor.clone()
    storages.add(place)
    return tensor


def _refuse_ties(model: nn.Module) -> None:
    """One parameter in two modules of which one compresses it is two different weights."""
    for tie in compressed_ties(model):
        raise PackedFileError(
            f"'{tie.keys[0]}' and '{tie.keys[1]}' are one parameter of two layers that compute with"
            ' different weights; leave both alone (dict(match=..., compress=False)), or untie them'
        )


def _constant(tensor: Tensor) -> list[Any] | None:
    """``[dtype, shape, value]`` of a tensor whose elements are all the same number, or one."""
    flat = tensor.reshape(-1)
    if flat.numel() == 0:
        return None
    raw = _bytes(tensor).reshape(flat.numel(), -1)
    if (flat.is_floating_point() and not bool(torch.isfinite(flat[0]))) or np.any(raw != raw[0]):
        return None
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), flat[0].item()]


def _is_narrow(tensor: Tensor) -> bool:
    """Whether a float tensor holds small integers alone, as the signs that folding leaves."""
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        return False
    if bool((torch.signbit(tensor) & (tensor == 0)).any()):
        # An integer zero has no sign.
        return False
    return torch.equal(tensor.clamp(-128, 127).to(torch.int8).to(tensor.dtype), tensor)


def _halved(tensor: Tensor, half: torch.dtype | None, is_step: bool = False) -> Tensor:
    """In the smaller type, if one is asked for and it can hold the values."""
    if half is None or tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    smaller = tensor.to(half)
    if not torch.equal(torch.isfinite(smaller), torch.isfinite(tensor)):
        return tensor
    if bool(((smaller == 0) & (tensor != 0)).any()):
        return tensor
    if is_step and bool((tensor < torch.finfo(half).tiny).any()):
        return tensor
    return smaller


def _numpy(tensor: Tensor) -> NDArray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
