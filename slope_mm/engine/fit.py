"""Does a checkpoint belong to this model? Asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from slope_mm.convert import compressed_layers
from slope_mm.errors import CheckpointError
from slope_mm.layers import CompressedLayer, find_weights

# Fine-tuning may replace heads (other classes), never half of the network.
LEAST_SHARE = 0.5


def check_fit(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str = '', *, complete: bool = False
) -> None:
    """Refuses a checkpoint of another architecture or another recipe.

    Args:
        model: A compressed model.
        state_dict: The checkpoint's tensors; ``module.`` prefixes are ignored.
        prefix: What the model's own keys start with.
        complete: Ask for every parameter of the stock model, and for calibrated activations where
            the recipe quantizes them (evaluation), instead of half of the weights (fine-tuning).

    Raises:
        CheckpointError: Says how much fits, and names a weight or a layer that does not.
    """
    given = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    prefix = prefix.removeprefix('module.')
    stock = {key: p for key, p in model.named_parameters() if '.slope_' not in f'.{key}'}
    weights = {key: p for key, p in stock.items() if p.dim() > 1}
    wrong = _unfit(model, weights, given, prefix)
    if len(wrong) > (1 - LEAST_SHARE) * len(weights):
        raise CheckpointError(
            f'the checkpoint belongs to another architecture than {type(model).__name__}:'
            f' {len(weights) - len(wrong)} of {len(weights)} weights fit,'
            f' {_difference(wrong, given, prefix, weights)};'
            ' give the checkpoint that was trained with this config'
        )
    _check_recipe(model, given, prefix)
    if not complete:
        return
    wrong = _unfit(model, stock, given, prefix)
    if wrong:
        raise CheckpointError(
            f'the checkpoint does not fit {type(model).__name__}: {len(wrong)} of {len(stock)}'
            f' parameters differ, {_difference(wrong, given, prefix, stock)}; give the checkpoint'
            ' that was trained with this config'
        )
    for name, layer in compressed_layers(model).items():
        key = f'{prefix}{name}.slope_act_step'
        if layer.slope_spec.activation_bits is not None and key not in given:
            raise CheckpointError(
                f"the checkpoint holds no activation step for layer '{name}', but the recipe"
                f' quantizes its input to {layer.slope_spec.activation_bits} bits: it comes from'
                ' another recipe or from a dense model; evaluate it with the config that trained'
                ' it, or train with this one first'
            )


def _check_recipe(model: nn.Module, given: Mapping[str, Any], prefix: str) -> None:
    alone = [key for key in given if key.startswith(prefix) and key.endswith('.slope_layer')]
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedLayer):
            key = f'{prefix}{name}.slope_layer'
            # Layers ask this as well, one by one while they load; here before the first is touched.
            module._check_signature(given.get(key), f'{prefix}{name}.')
            if key in given:
                alone.remove(key)
    names = {name for weight in find_weights(model) for name in weight.names} if alone else set()
    for key in alone:
        # A head that was replaced has left its keys, and nothing here that they could belong to.
        name = key.removeprefix(prefix).removesuffix('.slope_layer')
        if name in names:
            raise CheckpointError(
                f"the checkpoint's layer '{prefix}{name}' was compressed, but this recipe leaves it"
                ' alone; use the recipe that it was trained with, or start from the dense'
                ' checkpoint'
            )


def _unfit(
    model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Any], prefix: str
) -> list[str]:
    wrong = [key for key, p in own.items() if not _fits(given.get(prefix + key), p)]
    # A model may leave parts out of its checkpoints (a frozen encoder that it has from elsewhere).
    saved = model.state_dict().keys() if wrong else ()
    return [key for key in wrong if key in saved or prefix + key in given]


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _difference(
    wrong: list[str], given: Mapping[str, Any], prefix: str, own: Mapping[str, Tensor]
) -> str:
    key = wrong[0]
    found = given.get(prefix + key)
    there = 'is missing' if found is None else f'has shape {tuple(getattr(found, "shape", ()))}'
    return f"'{key}' {there} instead of {tuple(own[key].shape)}"


class CheckpointFit:
    """A load pre-hook of the root module: checks every state dict before it is loaded.

    It covers every route that loads weights (torch's own and mmengine's).
    """

    # A baked model does without.
    of_compression = True

    def attach(self, model: nn.Module) -> None:
        """Registers itself."""
        model._register_load_state_dict_pre_hook(self, with_module=True)

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        check_fit(module, state_dict, prefix)
