"""``SlopeModel``: a registered builder that gives any mmengine model its compressed layers.

The config's model section stays flat (``type`` becomes ``SlopeModel``, the stock type moves to
``arch``), and the stock object itself is returned. Conversion happens inside ``MODELS.build``, the
only moment at which DDP, the optimizer, EMA, ``init_detector`` and ``DetInferencer`` all see it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from slope_mm.convert import compressed_layers, convert
from slope_mm.engine.calibration import FirstBatchCalibration, is_training_forward
from slope_mm.engine.fit import CheckpointFit
from slope_mm.engine.packed import stock_model
from slope_mm.errors import ConfigError, nearest
from slope_mm.recipe import Recipe

NO_REGULARIZER = (
    'this SlopeModel is being trained by an optim wrapper that knows no regularizer, so cosine'
    " alignment would be lost; set optim_wrapper.constructor='slope_mm.SlopeOptimWrapperConstructor"
    "' and optim_wrapper.regularizer=dict(type='cosine'), or dict(type='none') for the naive arm"
)


class RegularizerGuard:
    """A forward pre-hook: refuses to train a SLOPE model without SLOPE's optim wrapper.

    The stock ``--amp`` flag rewrites ``optim_wrapper.type``, and an ``optim_wrapper`` section that
    replaces ours loses it; both would train without the regularizer, in silence.
    """

    # A baked model does without.
    of_compression = True

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_training_forward(model, args, kwargs) and not getattr(model, 'slope_in_step', False):
            raise ConfigError(NO_REGULARIZER)


class StepsAfterInit:
    """A compressed model's ``init_weights``: the stock one, which may not choose the steps.

    Detectors of DETR's family draw every parameter of two dimensions at random, learned steps too.

    Args:
        model: The model whose attribute this becomes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> None:
        type(self.model).init_weights(self.model)
        for layer in compressed_layers(self.model).values():
            # A checkpoint of a compressed model (init_cfg) brings its own.
            if not layer._step_ready:
                layer._await_initialisation()


@MODELS.register_module()
def SlopeModel(
    arch: str | type | None = None,
    recipe: Mapping[str, Any] | Recipe | None = None,
    **model: Any,
) -> nn.Module:
    """Builds a stock model and compresses its layers in place.

    Args:
        arch: The stock model's ``type``, for example ``'MaskRCNN'``.
        recipe: The recipe (see :mod:`slope_mm.recipe`).
        **model: Everything else of the stock model section.

    Returns:
        The stock model, an instance of ``arch``.

    Raises:
        ConfigError: If ``arch`` is missing or unknown, or ``recipe`` is missing.
        RecipeError: If the recipe is invalid or does not fit the model.
    """
    if not arch:
        raise ConfigError(
            "model has no 'arch': SlopeModel moves the stock type there; write"
            " model=dict(type='slope_mm.SlopeModel', arch='MaskRCNN', recipe=...) with the type of"
            ' the config that you inherit from'
        )
    if recipe is None:
        raise ConfigError(
            "model has no 'recipe'; write recipe=dict(weight=dict(sparsity='2:4', bits=4),"
            ' activation=dict(bits=4))'
        )
    # A broken recipe is cheaper to refuse before a large model is built.
    recipe = Recipe.parse(recipe)
    _check_arch(arch)
    stock = dict(type=arch, **model)
    # Stock detectors write into the config that they are built from; a packed file carries it.
    detector = MODELS.build(copy.deepcopy(stock))
    convert(detector, recipe)
    detector.slope_recipe = recipe
    detector.slope_config = stock_model(stock)
    detector.register_forward_pre_hook(RegularizerGuard(), with_kwargs=True)
    detector.register_forward_pre_hook(FirstBatchCalibration(), with_kwargs=True)
    CheckpointFit().attach(detector)
    if callable(getattr(type(detector), 'init_weights', None)):
        detector.init_weights = StepsAfterInit(detector)
    layers = compressed_layers(detector)
    print_log(
        f'SLOPE: {len(layers)} layers of {detector.__class__.__name__} are compressed'
        f' ({sum(layer.slope_spec.pattern is not None for layer in layers.values())} sparse)',
        logger='current',
        level=logging.INFO,
    )
    return detector


def _check_arch(arch: str | type) -> None:
    if not isinstance(arch, str):
        return
    with MODELS.switch_scope_and_registry(None) as registry:
        try:
            found = registry.get(arch)
        except (KeyError, RuntimeError):
            found = None
        if found is None:
            raise ConfigError(
                f'model.arch={arch!r} is not a registered model'
                f"{nearest(arch, registry.module_dict)}; give the stock config's model.type"
            )
