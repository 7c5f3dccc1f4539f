"""Loads packed files into models."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import PackedFileError, RecipeError, SlopeError
from slope_mm.layers import LAYER_KINDS, CompressedLayer, LayerSpec
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
            None if layout.input is None else layout.input.bits,
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
        for name, layer in file.layers.items():
            module = model.get_submodule(name)
            module.load_state_dict(_with_bias(file, name, layer_state(layer)), strict=True)
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
    for name, layer in file.layers.items():
        state.update({f'{name}.{key}': value for key, value in layer_state(layer).items()})
    for key, target in file.aliases.items():
        state[key] = state[target]
        # The layer's own state under its further names.
        owner, _, leaf = target.rpartition('.')
        if leaf == 'weight' and owner in file.layers:
            alias = key.rpartition('.')[0]
            own = [k for k in state if k.startswith(f'{owner}.slope_')]
            state.update({alias + k.removeprefix(owner): state[k] for k in own})
    return state


def layer_state(layer: PackedLayer) -> dict[str, Tensor]:
    """The state of one compressed layer, by its own keys; without a bias.

    Raises:
        PackedFileError: If its bytes are not what the header says.
    """
    layout = layer.layout
    spec = _about(layer.name, layout)
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
    if layout.input is not None:
        state['slope_act_step'] = torch.tensor([layout.input.step], dtype=torch.float32)
        signed = [SIGN_STATES[layout.input.signed]]
        state['slope_act_signed'] = torch.tensor(signed, dtype=torch.int8)
    return state


def _about(name: str, layout: WeightLayout) -> LayerSpec:
    try:
        return layer_spec(layout)
    except PackedFileError as error:
        raise PackedFileError(f"tensor '{name}.weight': {error}") from None


def _with_bias(file: PackedFile, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = f'{name}.bias'
    if key in file.plain:
        state['bias'] = _tensor(file.plain[key])
    return state


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
            if tensor is not None and not key.startswith('slope_'):
                tensors[f'{name}.{key}' if name else key] = tensor
    return tensors


def _check_model(file: PackedFile, model: nn.Module) -> None:
    own = _own_tensors(model)
    shapes = {key: tuple(array.shape) for key, array in file.plain.items()}
    shapes |= {f'{name}.weight': layer.layout.shape for name, layer in file.layers.items()}
    shapes |= {key: shapes[target] for key, target in file.aliases.items()}
    _refuse(sorted(shapes.keys() - own.keys()), 'the model has no')
    _refuse(sorted(own.keys() - shapes.keys()), 'the file has no')
    for key, tensor in own.items():
        if shapes[key] != tuple(tensor.shape):
            raise PackedFileError(
                f"tensor '{key}' has shape {shapes[key]}, and the model's {tuple(tensor.shape)};"
                ' give the model that was packed'
            )
    present = compressed_layers(model)
    for name, layer in file.layers.items():
        spec = _about(name, layer.layout)
        module = model.get_submodule(name)
        if isinstance(module, CompressedLayer):
            fits = module.slope_spec.signature == spec.signature
        else:
            fits = not present and type(module) in LAYER_KINDS
        if not fits:
            raise PackedFileError(
                f"layer '{name}' was packed as '{spec.signature}', which the model's"
                f' {type(module).__name__} cannot become; give the stock model, or one of the same'
                ' recipe'
            )
    _refuse(sorted(present.keys() - file.layers.keys()), 'it was packed without compression:')


def _refuse(keys: Iterable[str], problem: str) -> None:
    for key in keys:
        raise PackedFileError(f"{problem} '{key}'; give the model that was packed")


def _start_compression(file: PackedFile, model: nn.Module) -> None:
    for name, layer in file.layers.items():
        module = model.get_submodule(name)
        if not isinstance(module, CompressedLayer):
            module.__class__ = LAYER_KINDS[type(module)]
            module.start_compression(layer_spec(layer.layout))  # type: ignore[operator]
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
