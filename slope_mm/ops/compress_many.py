"""Many weights to their compressed form at once: a few kernels for a whole model, on CUDA.

A detector's step has one weight after another to compress, and a GPU waits for Python meanwhile:
what a kernel takes is a tenth of what it takes to ask for it. So the weights of a model are laid
into a table, and each kernel takes all that share a pattern, a code set and a shape of tile
(:mod:`slope_mm.ops.triton_kernels`). Values are those of :mod:`slope_mm.ops.compress`.

Weights are taken in bundles, in the model's order, whose gradients become known together: so the
exchange of gradients between processes goes along with the backward pass as it would without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_mm.ops import fused
from slope_mm.ops.quantization import Codes
from slope_mm.ops.weight_pass import DENSE, Groups

# Weights of a bundle: 32 MB of gradients, about what torch's DDP exchanges at once.
BUNDLE = 2**23
# SR-STE's decay would reach weights that no gradient came back to.
GRADIENTS = ('ste', 'masked')


class Many(NamedTuple):
    """One weight of many: what :func:`slope_mm.ops.compress_with_powers` takes, on CUDA.

    Attributes:
        weight: Latent weight, fp32, contiguous, output channels on axis 0 and input channels on 1.
        step: Learned steps, one an output channel.
        mask: Bool like ``weight``, contiguous, True where kept; None where ``groups`` decide.
        codes: The code set.
        groups: N:M groups; None for dense or with a mask.
        grad_scale: Scale of the step's gradient.
        gradient: Name in :data:`GRADIENTS`.
    """

    weight: Tensor
    step: Tensor
    mask: Tensor | None
    codes: Codes
    groups: Groups | None
    grad_scale: float
    gradient: str

    @property
    def place(self) -> tuple[Any, ...]:
        """What a table says of it: it serves for as long as this stays."""
        mask = 0 if self.mask is None else self.mask.data_ptr()
        pointers = self.weight.data_ptr(), self.step.data_ptr(), mask
        return (*pointers, self.weight.device, self.weight.shape, *self[3:])


@dataclass(frozen=True)
class _Table:
    """Weights that one kernel takes.

    Attributes:
        members: Their indices in the bundle.
        rows: The rows of each.
        table: int64 ``[weights, 6]`` on the GPU: where W, steps and mask are, the first row among
            those of the table, a row's length, and where it starts with all laid end to end.
        owner: int32 ``[rows]``: the weight of each row.
        scales: fp32 ``[rows]``: the scale of each row's step gradient.
        options: What the kernels take beside tensors.
        gradient: How the gradient passes the mask.
    """

    members: list[int]
    rows: list[int]
    table: Tensor
    owner: Tensor
    scales: Tensor
    options: dict[str, Any]
    gradient: str


def many_fit(weight: Tensor, mask: Tensor | None, gradient: str) -> bool:
    """Whether the kernels are there and take such a weight, with or without a frozen mask."""
    if weight.dtype != torch.float32 or gradient not in GRADIENTS:
        return False
    dense = weight.is_contiguous() and (mask is None or mask.is_contiguous())
    return dense and weight.dim() > 1 and fused.triton_enabled(weight)


def bundles(weights: Sequence[Many]) -> list[list[int]]:
    """Indices of weights in the order that they have, :data:`BUNDLE` weights together."""
    found: list[list[int]] = []
    held = BUNDLE
    for index, one in enumerate(weights):
        if held >= BUNDLE:
            found.append([])
            held = 0
        found[-1].append(index)
        held += one.weight.numel()
    return found


def compress_many(weights: Sequence[Many]) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`slope_mm.ops.compress_with_powers` of the weights of a bundle.

    Args:
        weights: On one GPU. All of them, and their steps, are trained, or none is.

    Returns:
        ``(compressed, powers)``: for each weight what it is of one alone.
    """
    places = tuple(one.place for one in weights)
    tables = _TABLES.get(places)
    if tables is None:
        while len(_TABLES) >= _MOST_TABLES:
            del _TABLES[next(iter(_TABLES))]
        tables = _TABLES[places] = _tables(weights)
    given = [x for one in weights for x in (one.weight, one.step)]
    outputs = CompressMany.apply(tables, *given)
    return list(outputs[: len(weights)]), list(outputs[len(weights) :])


# By what they say. They hold addresses and no weights.
_TABLES: dict[tuple[Any, ...], list[_Table]] = {}
_MOST_TABLES = 256


def _tables(weights: Sequence[Many]) -> list[_Table]:
    from slope_mm.ops import triton_pass

    groups: dict[Any, list[int]] = {}
    options: dict[Any, dict[str, Any]] = {}
    for index, one in enumerate(weights):
        length = one.weight.numel() // one.weight.shape[0]
        shape = triton_pass.shape_of(length, one.groups or DENSE)
        kind = dict(shape, MASKED=one.mask is not None, **triton_pass.code_range(one.codes))
        kind['ALIGNED'] = length % 16 == 0 and one.weight.data_ptr() % 16 == 0
        key = (*kind.items(), one.weight.device, one.gradient)
        options[key] = kind
        groups.setdefault(key, []).append(index)
    return [
        _table([weights[i] for i in members], members, options[key], key[-1])
        for key, members in groups.items()
    ]


def _table(
    weights: list[Many], members: list[int], options: dict[str, Any], gradient: str
) -> _Table:
    rows = [one.weight.shape[0] for one in weights]
    lines, first, start = [], 0, 0
    for one in weights:
        length = one.weight.numel() // one.weight.shape[0]
        mask = one.weight if one.mask is None else one.mask
        pointers = one.weight.data_ptr(), one.step.data_ptr(), mask.data_ptr()
        lines.append([*pointers, first, length, start])
        first, start = first + one.weight.shape[0], start + one.weight.numel()
    device = weights[0].weight.device
    with torch.inference_mode(False):
        counts = torch.tensor(rows)
        owner = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), counts)
        scales = torch.tensor([one.grad_scale for one in weights], dtype=torch.float32)
        return _Table(
            members,
            rows,
            torch.tensor(lines).to(device),
            owner.to(device),
            torch.repeat_interleave(scales, counts).to(device),
            options,
            gradient,
        )


class CompressMany(torch.autograd.Function):
    """``(w, step, w, step, ...) -> (compressed, ..., powers, ...)``."""

    @staticmethod
    def forward(ctx: Any, tables: list[_Table], *given: Tensor) -> tuple[Tensor, ...]:
        from slope_mm.ops import triton_pass

        ctx.set_materialize_grads(False)
        weights = given[::2]
        compressed: list[Any] = [None] * len(weights)
        powers: list[Any] = [None] * len(weights)
        ctx.tables, whole = tables, []
        for table in tables:
            own = [weights[i] for i in table.members]
            values = own[0].new_empty(sum(w.numel() for w in own))
            sums = own[0].new_empty(3, sum(table.rows))
            triton_pass.forward_many(table, values, sums)
            pieces = values.split([w.numel() for w in own])
            for i, w, piece, by_row in zip(
                table.members, own, pieces, sums.split(table.rows, 1), strict=True
            ):
                compressed[i], powers[i] = piece.view(w.shape), by_row
            whole.append(sums)
        ctx.save_for_backward(*given, *whole)
        return (*compressed, *powers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from slope_mm.ops import triton_pass

        count = len(grads) // 2
        saved = ctx.saved_tensors
        weights, steps, whole = saved[: 2 * count : 2], saved[1 : 2 * count : 2], saved[2 * count :]
        result: list[Tensor | None] = [None] * (2 * count)
        for table, sums in zip(ctx.tables, whole, strict=True):
            own = [weights[i] for i in table.members]
            by_value = _laid_out([grads[i] for i in table.members], own)
            by_sums = _beside([grads[count + i] for i in table.members], table.rows)
            if by_value is None and by_sums is None:
                continue
            if by_value is None:
                by_value = sums.new_zeros(sum(w.numel() for w in own))
            by_step = sums.new_empty(sums.shape[1])
            # Every element of a gradient is read before it is written over, by the same program.
            triton_pass.backward_many(table, by_value, by_sums, sums, by_value, by_step)
            pieces = zip(
                table.members,
                by_value.split([w.numel() for w in own]),
                by_step.split(table.rows),
                strict=True,
            )
            for i, by_weight, by_row in pieces:
                # What nothing came back to has no gradient, as it would have on its own.
                if grads[i] is not None or grads[count + i] is not None:
                    result[2 * i] = by_weight.view(weights[i].shape)
                    result[2 * i + 1] = by_row.view(steps[i].shape)
        return None, *result


def _laid_out(grads: list[Tensor | None], weights: list[Tensor]) -> Tensor | None:
    """Gradients end to end, zeros where there is none; None where there are none at all."""
    if all(grad is None for grad in grads):
        return None
    pieces = [
        torch.zeros_like(w) if grad is None else grad
        for grad, w in zip(grads, weights, strict=True)
    ]
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _beside(grads: list[Tensor | None], rows: list[int]) -> Tensor | None:
    """Gradients of sums beside each other, zeros where there is none."""
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return None
    filled = [
        some.new_zeros(3, count) if grad is None else grad
        for grad, count in zip(grads, rows, strict=True)
    ]
    return torch.cat(filled, 1)
