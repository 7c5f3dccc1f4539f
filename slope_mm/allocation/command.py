"""What tools/allocate.py does, and how it tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from slope_mm.allocation.budget import Allocation, Budget, Choice
from slope_mm.allocation.choices import PATTERNS, candidates, fitting, weight_choices
from slope_mm.allocation.rules import allocated_config
from slope_mm.allocation.sensitivity import sensitivities
from slope_mm.analysis.bops import macs_by_layer
from slope_mm.engine.calibration import calibrate
from slope_mm.engine.calibration_images import calibration_batches, fixed_statistics, run_losses
from slope_mm.engine.config_files import write_config
from slope_mm.engine.data_files import check_data
from slope_mm.engine.dense_start import load_dense
from slope_mm.engine.packed import stock_config
from slope_mm.errors import ConfigError
from slope_mm.packing.writer import SMALLEST
from slope_mm.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """What to allocate.

    Attributes:
        config: Path of a config with a SlopeModel.
        checkpoint: Its dense start.
        size: Bytes of the packed file, or None.
        bops: Bit operations of the first test image, or None.
        measure: ``'output'`` or ``'sqnr'``.
        patterns: Sparsity patterns; None in it is dense. None: of the usual ones those that fit.
        bits: Weight bits.
        batches: Calibration batches.
    """

    config: str
    checkpoint: str
    size: int | None
    bops: float | None
    measure: str
    patterns: Sequence[str | None] | None
    bits: Sequence[int]
    batches: int


def run(config: Config, request: Request, out: Path) -> str:
    """Measures, solves and writes the config.

    Args:
        config: The config, read.
        request: What to do.
        out: The config to write.

    Returns:
        What there is to tell, as text.

    Raises:
        SlopeError: If the budget, the choices, the config or the checkpoint are impossible;
            nothing is written then.
    """
    if request.size is None and request.bops is None:
        raise ConfigError('there is no budget; give --size 8MB, or --bops 12G, or both')
    choices = weight_choices(request.patterns or PATTERNS, request.bits)
    model, meta = load_dense(config, request.checkpoint)
    recipe = Recipe.parse(config.model.recipe.to_dict())
    if request.patterns is None:
        choices = weight_choices(fitting(model, recipe), request.bits)
    macs = {} if request.bops is None else _macs_of_first_image(model, config)
    options = candidates(model, recipe, choices, macs)
    needs_images = request.measure == 'output' or _quantizes_inputs(recipe)
    batches = calibration_batches(config, request.batches) if needs_images else []
    errors = sensitivities(
        model,
        recipe,
        choices,
        options.keys(),
        (lambda dense: run_losses(dense, batches)) if request.measure == 'output' else None,
    )

    def set_ranges(compressed: nn.Module) -> None:
        with fixed_statistics(compressed):
            calibrate(compressed, batches[:1])

    header = {'config': stock_config(config), 'dataset_meta': meta.get('dataset_meta') or {}}
    budget = Budget(model, recipe, options, errors, header, macs, set_ranges if batches else None)
    found = budget.solve(request.size, request.bops)
    told = summary(budget, found, request)
    comment = (
        f'Written by tools/allocate.py: {_limits(request)}, measured by {request.measure} error.'
    )

    def is_what_was_solved(written: Config) -> None:
        if Recipe.parse(written.model.recipe.to_dict()) != found.recipe:
            raise ConfigError(f"'{out}' does not carry the recipe that was solved; report this")

    text = allocated_config(request.config, out, found.recipe, request.checkpoint, comment)
    write_config(out, text, is_what_was_solved)
    return told


def _quantizes_inputs(recipe: Recipe) -> bool:
    return any([recipe.activation_bits, *(r.activation.get('bits') for r in recipe.rules)])


@torch.no_grad()
def _macs_of_first_image(model: nn.Module, config: Config) -> dict[str, int]:
    """As in studies: the first test image."""
    if config.get('test_dataloader') is None:
        raise ConfigError(
            'the config has no test_dataloader, whose first image says how often layers run; give a'
            ' config that can be evaluated'
        )
    check_data(config.get('test_dataloader'), 'test_dataloader')
    dataset = DATASETS.build(config.test_dataloader.dataset)
    loader = Runner.build_dataloader(
        {'dataset': dataset, 'sampler': {'type': 'DefaultSampler'}, 'batch_size': 1}
    )
    detector: Any = model
    return macs_by_layer(model, lambda: detector.test_step(loader.collate_fn([dataset[0]])))


def _limits(request: Request) -> str:
    limits = []
    if request.size is not None:
        limits.append(f'at most {request.size:,} bytes')
    if request.bops is not None:
        limits.append(f'at most {request.bops / 1e9:,.3f} GBOPs')
    return ' and '.join(limits)


def choice_name(choice: Choice) -> str:
    """``'2:4 W3'``."""
    return f'{choice[0] or "dense"} W{choice[1]}'


def summary(budget: Budget, found: Allocation, request: Request) -> str:
    """One line a layer, the totals, and the best uniform choice within the same budget."""
    lines = []
    width = max(map(len, found.chosen))
    for name, choice in found.chosen.items():
        candidate, error = budget.candidates[name][choice], budget.errors[name][choice]
        lines.append(
            f'{name:{width}}  {choice_name(choice):10}  error {error:.5f}'
            f'  {candidate.bits / 8e3:9.2f} kB'
        )
    lines += ['', 'Allocated: ' + _totals(budget, found, request)]
    uniform = budget.best_uniform(request.size, request.bops)
    if uniform is not None:
        lines.append(f'Uniform, {choice_name(uniform[0])}: ' + _totals(budget, uniform[1], request))
    return '\n'.join(lines)


def _totals(budget: Budget, allocation: Allocation, request: Request) -> str:
    text = (
        f'total error {allocation.error:.4f}, packed file at most {allocation.file_bytes:,}'
        f' bytes ({budget.file_bytes(allocation.recipe, SMALLEST):,} with these weights)'
    )
    if request.bops is not None:
        text += f', {allocation.bops / 1e9:,.3f} GBOPs'
    return text
