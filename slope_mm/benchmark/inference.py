"""Inference: stock PyTorch, the baked model in PyTorch, and ONNX Runtime with fp32 and our export.

Heavy parts are timed on the same inputs; end to end is ``test_step``, preprocessing, proposals,
RoIAlign and NMS included, which all arms share with stock mmdet.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slope_mm.benchmark.detectors import (
    SameProposals,
    arm_config,
    classes_of,
    make_batch,
    read_stock,
)
from slope_mm.benchmark.interleave import Timings, interleave
from slope_mm.convert import bake, compressed_layers
from slope_mm.engine import launch
from slope_mm.engine.calibration import observing
from slope_mm.engine.packed import stock_model
from slope_mm.errors import ConfigError
from slope_mm.export import require_runtime
from slope_mm.export.folder import ExportIndex
from slope_mm.export.gate import optimized_operators
from slope_mm.export.images import image_batches
from slope_mm.export.parts import capture_inputs, detector_parts, has_rois
from slope_mm.export.runtime import OnnxPart, assemble
from slope_mm.export.writer import export_parts, write_part

Progress = Callable[[str], None]
TORCH, BAKED, ORT, OURS = 'PyTorch fp32', 'PyTorch baked', 'ONNX Runtime fp32', 'ONNX Runtime ours'
HEAVY, WHOLE = 'heavy parts', 'end to end'
# Pairs of box and class that pass a trained detector's threshold in a picture, roughly.
CANDIDATES = 200


def inference(args: Namespace, progress: Progress) -> tuple[list[dict[str, Any]], list[str]]:
    """Times the arms at every size.

    Args:
        args: ``config``, ``checkpoint`` (None for random weights, calibrated on noise), ``recipe``
            (the arm that a stock config is compressed as), ``sizes`` (height and width),
            ``rounds``, ``threads``.
        progress: Called with a line now and then.

    Returns:
        Rows, and sentences about them.
    """
    require_runtime()
    config = read_stock(args.config)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for size in args.sizes:
        stock, compressed = build_models(config, args)
        batch = _batch(stock, config, size, args.checkpoint)
        _calibrate(compressed, batch)
        if args.checkpoint is None:
            _move_apart(compressed)
        with tempfile.TemporaryDirectory() as folder:
            arms = Arms(
                stock, compressed, batch, Path(folder), args.threads, args.checkpoint is None
            )
            rows += _time(arms, 'x'.join(map(str, size)), args.rounds, progress)
            notes = [arms.products()]
    return rows, notes


def build_models(config: Config, args: Namespace) -> tuple[nn.Module, nn.Module]:
    """The stock model and the compressed one, with the same latent weights, in evaluation mode."""
    compressed_config = config
    if 'recipe' not in config.model:
        if args.checkpoint is not None:
            raise ConfigError(
                'a checkpoint needs the config that it was trained with, which has a SlopeModel'
            )
        compressed_config = arm_config(config, args.recipe)
    torch.manual_seed(0)
    compressed: Any = launch.build_model(compressed_config)
    if args.checkpoint is None:
        compressed.init_weights()
        _fill(compressed)
    else:
        launch.load_weights(compressed, args.checkpoint)
    section = stock_model(compressed_config.model.to_dict())
    stock: Any = MODELS.build(Config(section))
    state = compressed.state_dict()
    stock.load_state_dict({key: state[key] for key in stock.state_dict()})
    return stock.eval(), compressed.eval()


def _batch(
    model: nn.Module, config: Config, size: tuple[int, int], checkpoint: str | None
) -> dict[str, Any]:
    """One image: of the test set for trained weights, else of noise."""
    batch = make_batch(model, size, 1, classes_of(config))
    if checkpoint is not None:
        image = image_batches(config, 1)[0]['inputs'][0][None].float()
        resized = F.interpolate(image, size=size, mode='bilinear', antialias=True)
        batch['inputs'] = [resized[0].round().clamp(0, 255).byte()]
    return batch


def _calibrate(model: nn.Module, batch: dict[str, Any]) -> None:
    """Gives uncalibrated input quantizers the range of this batch."""
    with observing(model):
        capture_inputs(model, copy.deepcopy(batch))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Gives batch norms and biases values, as training does: zeros may be easier to compute."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for spread in (module.running_var, module.weight):
                assert spread is not None
                spread.uniform_(0.7, 1.4, generator=generator)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(('.bias', '.running_mean')):
            value.normal_(0, 0.1, generator=generator)


@torch.no_grad()
def _move_apart(model: nn.Module) -> None:
    """Moves input steps by a few percent, as training does, each by its own.

    Layers that read the same map would otherwise share a quantizer, and whatever can be made of
    that, as no trained model has it.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in compressed_layers(model).values():
        if layer.slope_act_step is not None:
            shift = 0.1 * torch.rand((), generator=generator) - 0.05
            layer.slope_act_step.mul_(1 + shift)


@torch.no_grad()
def use_own_threshold(detector: Any, batch: dict[str, Any]) -> None:
    """Lets a random network find as much as a trained one.

    Its score threshold becomes the score of the ``CANDIDATES``-th best pair of box and class, which
    is what goes into NMS. At the config's own threshold it would find nothing.

    Args:
        detector: One whose second stage or dense head has a ``score_thr``; others are left alone.
        batch: One image.
    """
    holder = detector.roi_head if has_rois(detector) else detector.bbox_head
    if 'score_thr' not in (getattr(holder, 'test_cfg', None) or {}):
        return
    head = holder.bbox_head if has_rois(detector) else holder
    scores: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if has_rois(detector):
            scores.append(outputs[0].softmax(-1)[:, :-1].flatten())
        else:
            scores.extend(level.sigmoid().flatten() for level in outputs[0])

    handle = (head[-1] if isinstance(head, nn.ModuleList) else head).register_forward_hook(record)
    detector.test_step(copy.deepcopy(batch))
    handle.remove()
    every = torch.cat(scores)
    holder.test_cfg.score_thr = float(every.topk(min(CANDIDATES, every.numel())).values[-1])


class Arms:
    """The four arms on one batch.

    Args:
        stock: The stock model.
        compressed: The compressed one.
        batch: One image.
        folder: For the exports' files.
        threads: Threads of every session.
        random: Whether the weights are random (see :func:`use_own_threshold`).
    """

    def __init__(
        self,
        stock: nn.Module,
        compressed: nn.Module,
        batch: dict[str, Any],
        folder: Path,
        threads: int,
        random: bool,
    ) -> None:
        self.batch = batch
        self.inputs = {
            name: found[0]
            for name, found in capture_inputs(compressed, copy.deepcopy(batch)).items()
        }
        given = {name: [x] for name, x in self.inputs.items()}
        self.detectors: dict[str, Any] = {TORCH: stock, BAKED: bake(compressed)}
        self.parts: dict[str, dict[str, Callable[[Tensor], Any]]] = {
            arm: {part.name: part.module for part in detector_parts(detector)}
            for arm, detector in self.detectors.items()
        }
        self.contents: dict[str, bytes] = {}
        for arm, detector in ((ORT, stock), (OURS, compressed)):
            made = folder / arm
            made.mkdir()
            exported = export_parts(detector, given)
            index = ExportIndex([write_part(part, made) for part in exported], '', {}, {})
            self.parts[arm] = {f.name: OnnxPart.load(made, f, threads) for f in index.parts}
            self.detectors[arm] = assemble(copy.deepcopy(stock), index, made, threads)
            if arm == OURS:
                self.contents = {part.name: part.cpu.SerializeToString() for part in exported}
        proposals = SameProposals()
        for detector in self.detectors.values():
            proposals.attach(detector)
            if random:
                use_own_threshold(detector, batch)

    def part(self, arm: str, name: str) -> Callable[[], Any]:
        """One part of an arm on its input."""
        call, x = self.parts[arm][name], self.inputs[name]

        def run() -> Any:
            with torch.no_grad():
                return call(x)

        return run

    def whole(self, arm: str) -> Callable[[], Any]:
        """A detector's ``test_step`` on the batch."""
        detector = self.detectors[arm]

        def run() -> Any:
            with torch.no_grad():
                return detector.test_step(copy.deepcopy(self.batch))

        return run

    def products(self) -> str:
        """How many integer and floating-point products our optimized graphs have."""
        counts = []
        for name, content in self.contents.items():
            found = optimized_operators(content)
            counts.append(f'{name}: ' + ', '.join(f'{n} {kind}' for kind, n in found.items()))
        return f'products in the optimized graphs: {"; ".join(counts)}'


def _time(arms: Arms, size: str, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    names = (TORCH, BAKED, ORT, OURS)
    rows: list[dict[str, Any]] = []
    total: dict[str, list[float]] = {name: [0.0] * rounds for name in names}
    for part in arms.inputs:
        timings = interleave({arm: arms.part(arm, part) for arm in names}, rounds)
        shape = 'x'.join(map(str, arms.inputs[part].shape))
        rows += _rows(timings, size, f'{part} {shape}')
        for arm in names:
            pairs = zip(total[arm], timings.seconds[arm], strict=True)
            total[arm] = [a + b for a, b in pairs]
        progress(f'{size} {part} done')
    rows += _rows(Timings(total), size, HEAVY)
    rows += _rows(interleave({arm: arms.whole(arm) for arm in names}, rounds), size, WHOLE)
    progress(f'{size} {WHOLE} done')
    return rows


def _rows(timings: Timings, size: str, what: str) -> list[dict[str, Any]]:
    rows = []
    for row in timings.rows(TORCH, size=size, what=what):
        arm = row['arm']
        rows.append(
            dict(
                size=size,
                what=what,
                arm=arm,
                ms=row['ms'],
                ms_low=row['ms_low'],
                ms_high=row['ms_high'],
                # Times as fast, compared round by round.
                vs_torch=timings.ratio(TORCH, arm).median,
                vs_ort=timings.ratio(ORT, arm).median,
            )
        )
    return rows
