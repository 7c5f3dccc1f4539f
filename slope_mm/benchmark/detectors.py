"""Whole detectors as benchmark arms: the stock model and its compressed twins, on one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from slope_mm.engine.calibration import observing
from slope_mm.engine.launch import build_model, read_config
from slope_mm.errors import ConfigError
from slope_mm.ops.fused import fused

# Arm to the recipe's weight and activation settings; 'stock' has none.
ARMS: dict[str, dict[str, Any] | None] = {
    'stock': None,
    'dense W4': dict(weight=dict(sparsity=None, bits=4)),
    'W4': dict(weight=dict(sparsity='2:4', bits=4)),
    'W4A4': dict(weight=dict(sparsity='2:4', bits=4), activation=dict(bits=4)),
}
# Behind an arm's name: its passes are fused kernels (``optim_wrapper.compile``).
COMPILED = ' compiled'


def read_stock(path: str) -> Config:
    """The config that a benchmark's arms are made of: a file, or ``mmdet::…``."""
    if '::' in path:
        from mmengine.hub import get_config

        return get_config(path)
    return read_config(path)


def arm_config(config: Config, arm: str) -> Config:
    """The config of one arm: random weights, and for compressed arms a cosine regularizer.

    Raises:
        ConfigError: For an unknown arm, or a base config that is compressed itself.
    """
    plain = arm.removesuffix(COMPILED)
    if plain not in ARMS or (plain != arm and ARMS[plain] is None):
        raise ConfigError(
            f'arm {arm!r} is unknown; choose from {", ".join(ARMS)}, the compressed ones also with'
            f' {COMPILED!r} behind'
        )
    if 'recipe' in config.model:
        raise ConfigError('give the config of a stock model; the arms compress it themselves')
    made = copy.deepcopy(config)
    made.load_from = None
    _without_downloads(made.model)
    recipe = ARMS[plain]
    if recipe is not None:
        made.model.arch, made.model.type = made.model.type, 'slope_mm.SlopeModel'
        made.model.recipe = recipe
        made.optim_wrapper.constructor = 'slope_mm.SlopeOptimWrapperConstructor'
        made.optim_wrapper.regularizer = dict(type='cosine', weight=1.0)
        made.optim_wrapper.compile = plain != arm
    return made


def _without_downloads(section: Any) -> None:
    """Speed does not depend on the weights' values: no checkpoint is needed."""
    if isinstance(section, dict):
        init = section.get('init_cfg')
        if isinstance(init, dict) and init.get('type') == 'Pretrained':
            section['init_cfg'] = None
        for value in section.values():
            _without_downloads(value)
    elif isinstance(section, (list, tuple)):
        for value in section:
            _without_downloads(value)


class SameProposals:
    """Gives the RoI heads of all arms the first arm's proposals, so that they do the same work.

    RoIAlign's cost grows with the boxes, and every arm's random RPN proposes others: without this
    a sixth of the "overhead" of compression was larger boxes. The RPNs themselves run as they are.
    """

    def __init__(self) -> None:
        self._recorded: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> None:
        """Wraps ``loss`` and ``predict`` of a two-stage model's RoI head."""
        head: Any = getattr(model, 'roi_head', None)
        for name in ('loss', 'predict') if head is not None else ():
            setattr(head, name, self._wrapped(name, getattr(head, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def same(x: Any, proposals: Any, *args: Any, **kwargs: Any) -> Any:
            first = self._recorded.setdefault(name, copy.deepcopy(proposals))
            return call(x, copy.deepcopy(first), *args, **kwargs)

        return same


def build_arms(
    config: Config, arms: list[str], device: str = 'cpu'
) -> dict[str, tuple[nn.Module, Config]]:
    """Builds the arms with the same initial weights.

    Returns:
        Arm to its model (in training mode) and config.
    """
    built: dict[str, tuple[BaseModel, Config]] = {}
    proposals, weights = SameProposals(), None
    for arm in arms:
        made = arm_config(config, arm)
        torch.manual_seed(0)
        model: Any = build_model(made)
        model.init_weights()
        if weights is None:
            weights = {k: v for k, v in model.state_dict().items() if '.slope_' not in k}
        model.load_state_dict(weights, strict=False)
        proposals.attach(model)
        built[arm] = (model.to(device).train(), made)
    return built


def make_batch(model: nn.Module, size: tuple[int, int], count: int, classes: int) -> dict[str, Any]:
    """Images of noise with eight boxes and masks each, as a dataloader gives them.

    Args:
        model: Any of the arms; says whether masks are wanted.
        size: Height and width in pixels.
        count: Images.
        classes: Number of classes that labels are drawn from.
    """
    from mmdet.testing import demo_mm_inputs

    roi_head = getattr(model, 'roi_head', None)
    with_mask = bool(getattr(roi_head, 'with_mask', False))
    return demo_mm_inputs(
        count, [(3, *size)] * count, num_items=[8] * count, num_classes=classes, with_mask=with_mask
    )


class TrainingStep:
    """One whole step: preprocessing, forward, backward, update."""

    def __init__(self, model: BaseModel, config: Config, batch: dict[str, Any]) -> None:
        with DefaultScope.overwrite_default_scope(config.get('default_scope') or 'mmdet'):
            self._wrapper = build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))
        # Its learning rate times noise would drive a random model apart; the work is the same.
        for group in self._wrapper.optimizer.param_groups:
            group['lr'] = 1e-6
        self._model, self._batch = model, batch
        # Building a wrapper decides for the whole process; here arms take turns.
        self._kernels = bool(config.optim_wrapper.get('compile'))
        # The first step initialises what later ones only use, calibration included; the second
        # learns how often a layer runs when nothing is calibrated.
        self()
        self()

    def __call__(self) -> Any:
        torch.manual_seed(0)
        with fused(self._kernels):
            return self._model.train_step(copy.deepcopy(self._batch), self._wrapper)

    def standing_bytes(self) -> int:
        """Bytes between two steps: parameters, buffers, the optimizer's state (no gradients)."""
        self._wrapper.zero_grad()
        state = [
            value
            for values in self._wrapper.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        held = [*self._model.parameters(), *self._model.buffers(), *state]
        return sum(tensor.nbytes for tensor in held)


def calibrate_on(model: BaseModel, batch: dict[str, Any]) -> None:
    """Gives input quantizers a range: without one an input passes as it is in evaluation.

    What is not reached (heads, where nothing is found) does not run when it is timed either.
    """
    model.eval()
    with torch.no_grad(), observing(model):
        model.val_step(copy.deepcopy(batch))


def evaluation_step(model: BaseModel, config: Config, batch: dict[str, Any]) -> Callable[[], Any]:
    """One ``val_step`` as the Runner's loop does it, in evaluation mode."""
    kernels = bool(config.optim_wrapper.get('compile'))
    model.eval()

    def step() -> Any:
        with torch.no_grad(), fused(kernels):
            return model.val_step(copy.deepcopy(batch))

    return step


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, the compression's own steps left out."""
    return sum(p.nbytes for n, p in model.named_parameters() if '.slope_' not in n)


def classes_of(config: Config) -> int:
    """Number of classes of a detector's config; 80 where no head says it."""
    found: list[int] = []

    def look(section: Any) -> None:
        if isinstance(section, dict):
            if 'num_classes' in section:
                found.append(int(section['num_classes']))
            for value in section.values():
                look(value)
        elif isinstance(section, (list, tuple)):
            for value in section:
                look(value)

    look(config.model)
    return min(found, default=80)
