"""Which layers sparse hardware can run, and at which sizes that pays.

Conditions from the vendors' documentation: TensorRT's "structured sparsity" (weights ``[K, C, R,
S]``, at every ``(k, r, s)`` at most 2 non-zeros in 4 consecutive ``c``, ``C % 4 == 0``, no groups;
pays from about 256 channels on), and torch's ``to_sparse_semi_structured`` (2-D weights with 2:4 on
the last axis; rows and columns multiples of what the dtype's kernel tiles).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slope_mm.errors import TensorError
from slope_mm.export.layers import exportable
from slope_mm.layers import CompressedLayer

GROUP, KEPT = 4, 2
# Channels from which TensorRT's sparse kernels are faster than the dense ones.
PAYS_FROM = 256
# Multiples of (rows, columns) that torch's semi-structured kernels ask for (cuSPARSELt's shapes).
SEMI_STRUCTURED_SHAPES: dict[torch.dtype, tuple[int, int]] = {
    torch.int8: (32, 128),
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.float32: (32, 32),
}


@dataclass(frozen=True)
class HardwareReport:
    """What sparse hardware says to one layer.

    Attributes:
        name: The layer.
        kind: Its stock class.
        shape: Its weight's shape.
        is_2_to_4: Whether its weight holds 2:4 along the input channels.
        tensorrt: Why TensorRT cannot run it sparse, or ``''``.
        pays: Whether it is large enough to gain.
        semi_structured: Why torch's semi-structured kernels cannot run it in fp16, or ``''``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    is_2_to_4: bool
    tensorrt: str
    pays: bool
    semi_structured: str


def holds_2_to_4(weight: Tensor, axis: int = 1) -> bool:
    """Whether at most 2 of 4 consecutive values along an axis are non-zero, everywhere.

    Args:
        weight: Any weight.
        axis: Its input channels.

    Returns:
        False where the axis has no multiple of 4.
    """
    size = weight.shape[axis]
    if size % GROUP:
        return False
    groups = weight.movedim(axis, -1).reshape(-1, GROUP)
    return bool(((groups != 0).sum(1) <= KEPT).all())


def tensorrt_obstacle(module: Any, weight: Tensor) -> str:
    """Why TensorRT cannot run a layer with sparse weights, or ``''``."""
    if isinstance(module, nn.ConvTranspose2d):
        return 'transposed convolution'
    if getattr(module, 'groups', 1) > 1:
        return f'grouped ({module.groups})'
    if weight.shape[1] % GROUP:
        return f'{weight.shape[1]} input channels are no multiple of 4'
    return '' if holds_2_to_4(weight) else 'not 2:4 along the input channels'


def semi_structured_obstacle(
    module: Any, weight: Tensor, dtype: torch.dtype = torch.float16
) -> str:
    """Why torch's semi-structured kernels cannot run a layer, or ``''``.

    A 1x1 convolution without groups counts as linear.

    Raises:
        TensorError: For a dtype without such kernels.
    """
    if dtype not in SEMI_STRUCTURED_SHAPES:
        known = ', '.join(str(known) for known in SEMI_STRUCTURED_SHAPES)
        raise TensorError(f'there are no semi-structured kernels for {dtype}; choose from {known}')
    if isinstance(module, nn.ConvTranspose2d):
        return 'transposed convolution'
    if getattr(module, 'groups', 1) > 1:
        return f'grouped ({module.groups})'
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        return f'{weight.shape[2]}x{weight.shape[3]} convolution'
    rows, columns = SEMI_STRUCTURED_SHAPES[dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f'{weight.shape[0]} x {weight.shape[1]} is no multiple of {rows} x {columns}'
    return '' if holds_2_to_4(weight) else 'not 2:4 along the input channels'


@torch.no_grad()
def hardware_reports(model: nn.Module) -> list[HardwareReport]:
    """One report for each convolution and linear layer of a compressed or plain model."""
    reports = []
    for name, module in model.named_modules():
        if not exportable(module):
            continue
        compressed = isinstance(module, CompressedLayer)
        weight = module.compressed_weight() if compressed else module.weight
        axis = 0 if isinstance(module, nn.ConvTranspose2d) else 1
        kind = 'Linear' if isinstance(module, nn.Linear) else type(module).__name__
        reports.append(
            HardwareReport(
                name,
                kind.removeprefix('Slope').removeprefix('MMCV'),
                tuple(weight.shape),
                holds_2_to_4(weight, axis),
                tensorrt_obstacle(module, weight),
                min(weight.shape[:2]) >= PAYS_FROM,
                semi_structured_obstacle(module, weight),
            )
        )
    return reports


def hardware_table(model: nn.Module) -> str:
    """The reports as text, and how much of the weights each kind of hardware can run."""
    reports = hardware_reports(model)
    width = max([len(report.name) for report in reports], default=5)
    lines = [
        f'{"layer":<{width}}  {"weight":<18}  {"2:4":<3}  {"TensorRT sparse":<42}'
        '  torch semi-structured (fp16)'
    ]
    for report in reports:
        shape = 'x'.join(map(str, report.shape))
        large = 'yes' if report.pays else f'yes, but too small to pay (< {PAYS_FROM})'
        lines.append(
            f'{report.name:<{width}}  {shape:<18}  {"yes" if report.is_2_to_4 else "no":<3}'
            f'  {"no: " + report.tensorrt if report.tensorrt else large:<42}'
            f'  {"no: " + report.semi_structured if report.semi_structured else "yes"}'
        )
    total = sum(_numel(report) for report in reports) or 1
    for label, fits in (
        ('TensorRT can run sparse', [r for r in reports if not r.tensorrt]),
        ('TensorRT gains from', [r for r in reports if not r.tensorrt and r.pays]),
        ('torch can run semi-structured', [r for r in reports if not r.semi_structured]),
    ):
        share = sum(_numel(report) for report in fits) / total
        lines.append(f'{label}: {len(fits)} of {len(reports)} layers, {share:.1%} of their weights')
    return '\n'.join(lines)


def _numel(report: HardwareReport) -> int:
    return torch.Size(report.shape).numel()
