"""Loads packed files into models."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slope_mm.convert import compressed_layers, start_layers
from slope_mm.errors import PackedFileError, RecipeError, SlopeError
from slope_mm.layers import CompressedLayer, LayerSpec, find_weights
from slope_mm.layers.reuse import WeightReuse
from slope_mm.layers.standardized import STANDARDIZED, StandardizedWeight
from slope_mm.ops import parse_pattern
from slope_mm.packing.codec import weight_values
from slope_mm.packing.layout import WeightLayout
from slope_mm.packing.reader import PackedFile, PackedLayer
from slope_mm.recipe import Recipe

# The states of slope_act_signed.
SIGN_STATES = {None: -1, False: 0, True: 1}


def layer_spec(layout: WeightLayout) -> LayerSpec:
    """What the layer was told to do when it was trained.

    Raises:
        PackedFileError: If the header asks for what this version does not know.
    """
    try:
        spec = LayerSpec(
            None if layout.pattern is None else parse_pattern(layout.pattern),
            layout.bits,
            layout.codes,
            layout.step,
            layout.quantizers[0].bits if layout.quantizers else None,
            layout.gradient,
            layout.order,
            layout.note,
        )
        codes = spec.weight_codes
    except RecipeError as error:
        raise PackedFileError(f'the header is not to be used: {error}') from None
    given = (layout.qn, layout.qp, layout.offset)
    if codes is not None and given != (codes.qn, codes.qp, codes.offset):
        raise PackedFileError(
            f"the header's codes {given} are not those of '{layout.codes}' at {layout.bits} bits"
        )
    return spec


@torch.no_grad()
def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads a packed file into a model, which then computes as the one that was packed.

    A layer's ``weight`` becomes the compressed weight, and its mask is held: quantizing it again
    with the same steps gives it back bit for bit, so that the layer goes on as the trained one did,
    input quantizer included, and fine-tuning can continue. ``slope_mm.bake`` makes it plain.

    Args:
        path: The file.
        model: The stock model, whose layers are compressed here as the header says; or one that is
            compressed by the same recipe already.

    Returns:
        The same object.

    Raises:
        PackedFileError: If the file is damaged, or belongs to another model or recipe; the model is
            then as it was, unless a damage shows only while its last bytes are decoded.
    """
    file = PackedFile.open(path)
    try:
        _check_model(file, model)
        _start_compression(file, model)
        for name, module in compressed_layers(model).items():
            _fill(module, layer_state(file.layers[name]))
        _copy_plain(file, model)
    except PackedFileError as error:
        raise PackedFileError(f'{os.fspath(path)}: {error}') from None
    return model


def packed_state_dict(file: PackedFile) -> dict[str, Tensor]:
    """The state dict of the compressed model: what its training checkpoint would hold, with the
    compressed weights in place of the latent ones, and masks held.

    Raises:
        PackedFileError: If a weight cannot be decoded.
    """
    state: dict[str, Tensor] = {key: _tensor(array) for key, array in file.plain.items()}
    owners = {layer.key: name for name, layer in file.layers.items()}
    for name, layer in file.layers.items():
        own = layer_state(layer)
        state[layer.key] = own.pop('weight')
        state.update({f'{name}.{key}': value for key, value in own.items()})
    for key, target in file.aliases.items():
        state[key] = state[target]
        if target in owners:
            # The layer's own state under its further names: the key without '.weight', '_weight'.
            owner, alias = owners[target], key[: -len('.weight')]
            own_keys = [k for k in state if k.startswith(f'{owner}.slope_')]
            state.update({alias + k.removeprefix(owner): state[k] for k in own_keys})
    return state


def layer_state(layer: PackedLayer) -> dict[str, Tensor]:
    """The state of one compressed layer, by its own keys; without a bias.

    Raises:
        PackedFileError: If its bytes are not what the header says.
    """
    layout = layer.layout
    spec = _about(layer)
    values, mask = layer.decode()
    state = {
        'weight': _tensor(weight_values(layout, values, mask, layer.step)),
        'slope_layer': torch.tensor(list(spec.signature.encode()), dtype=torch.uint8),
    }
    if layer.step is not None:
        state['slope_step'] = _tensor(layer.step).float()
    if mask is not None:
        state['slope_mask'] = _tensor(mask)
    elif spec.pattern is not None:
        # Saved on a ramp that had not left dense yet.
        state['slope_mask'] = torch.ones(layout.shape, dtype=torch.bool)
    if layout.standardized:
        state[STANDARDIZED] = torch.ones(1, dtype=torch.uint8)
    if layout.quantizers:
        steps = [quantizer.step for quantizer in layout.quantizers]
        signed = [SIGN_STATES[quantizer.signed] for quantizer in layout.quantizers]
        state['slope_act_step'] = torch.tensor(steps, dtype=torch.float32)
        state['slope_act_signed'] = torch.tensor(signed, dtype=torch.int8)
    return state


def _about(layer: PackedLayer) -> LayerSpec:
    try:
        return layer_spec(layer.layout)
    except PackedFileError as error:
        raise PackedFileError(f"tensor '{layer.key}': {error}") from None


def _fill(layer: CompressedLayer, state: dict[str, Tensor]) -> None:
    """Gives a layer its weight and its own state; what else it has is none of the file's layers."""
    layer.weight.copy_(state.pop('weight'))
    # Of an earlier weight, if this one is dense or on a ramp.
    layer.release_mask()
    missing, unexpected = layer.load_state_dict(state, strict=False)
    wrong = [key for key in (*missing, *unexpected) if key.startswith('slope_')]
    if wrong:
        raise PackedFileError(f"its '{wrong[0]}' does not fit the layer; give the stock model")


def _tensor(array: NDArray) -> Tensor:
    if array.size > 1 and not any(array.strides):
        # A constant: one number in memory, whatever its shape.
        return torch.from_numpy(array.reshape(-1)[:1].copy())[0].expand(array.shape)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(np.asarray(array))


# --- does the file belong to the model? ----------------------------------------------------------


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The stock parameters and saved buffers, also under the further names of shared modules."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        saved = [
            (key, buffer)
            for key, buffer in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        ]
        for key, tensor in [*module._parameters.items(), *saved]:
            added = isinstance(module, CompressedLayer) and key.startswith('slope_')
            if tensor is not None and not added:
                tensors[f'{name}.{key}' if name else key] = tensor
    return tensors


def _check_model(file: PackedFile, model: nn.Module) -> None:
    own = _own_tensors(model)
    shapes = {key: tuple(array.shape) for key, array in file.plain.items()}
    shapes |= {layer.key: layer.layout.shape for layer in file.layers.values()}
    shapes |= {key: shapes[target] for key, target in file.aliases.items()}
    _refuse(sorted(shapes.keys() - own.keys()), 'the model has no')
    missing = own.keys() - shapes.keys()
    # A model may leave parts out of its state dict.
    _refuse(sorted(missing & model.state_dict().keys() if missing else missing), 'the file has no')
    for key, tensor in own.items():
        if key in shapes and shapes[key] != tuple(tensor.shape):
            raise PackedFileError(
                f"tensor '{key}' has shape {shapes[key]}, and the model's {tuple(tensor.shape)};"
                ' give the model that was packed'
            )
    present = compressed_layers(model)
    weights = {name: weight for weight in find_weights(model) for name in weight.names}
    for name, layer in file.layers.items():
        spec = _about(layer)
        weight = weights.get(name)
        if weight is None or weight.key != layer.key:
            raise PackedFileError(
                f"the model has no layer '{name}'; give the model that was packed"
            )
        if weight.layer is not None:
            fits = weight.layer.slope_spec.signature == spec.signature
        else:
            fits = not present and weight.kind is not None and not weight.obstacle
        standardizes = weight.kind is not None and issubclass(weight.kind, StandardizedWeight)
        fits = fits and standardizes == layer.layout.standardized
        if not fits:
            raise PackedFileError(
                f"layer '{name}' was packed as '{spec.signature}', which the model's"
                f' {type(weight.owner).__name__} cannot become; give the stock model, or one of the'
                ' same recipe'
            )
    _refuse(sorted(present.keys() - file.layers.keys()), 'it was packed without compression:')


def _refuse(keys: Iterable[str], problem: str) -> None:
    for key in keys:
        raise PackedFileError(f"{problem} '{key}'; give the model that was packed")


def _start_compression(file: PackedFile, model: nn.Module) -> None:
    if not compressed_layers(model):
        # Evaluations compress each weight once, as in a converted model.
        WeightReuse.attach(model)
    start_layers(model, {name: layer_spec(la.layout) for name, la in file.layers.items()})
    recipe = file.header.get('recipe')
    if recipe is not None and not hasattr(model, 'slope_recipe'):
        try:
            setattr(model, 'slope_recipe', Recipe.parse(recipe))  # noqa: B010 - no submodule
        except SlopeError as error:
            raise PackedFileError(f"the header's recipe is not to be used: {error}") from None


def _copy_plain(file: PackedFile, model: nn.Module) -> None:
    own = _own_tensors(model)
    for key, array in file.plain.items():
        own[key].copy_(_tensor(array))
