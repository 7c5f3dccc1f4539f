"""torch's semi-structured kernels under a plain model: 2:4 linear and 1x1 layers on CUDA.

The layers keep their class, names and state dict; their forward is another one. Each is compared
with the dense layer before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from slope_mm.errors import ExportError
from slope_mm.export.hardware import semi_structured_obstacle
from slope_mm.export.layers import exportable

# Relative error against the dense layer in the same dtype, whose sums have another order.
EQUALITY_TOLERANCE = 1e-2
CHECKED_ROWS = 64
NEEDS_CUDA = (
    'the semi-structured kernels need a CUDA GPU of compute capability 8.0 or newer; on a CPU use'
    ' --backend onnxruntime'
)


class SemiStructuredForward:
    """Forward of a linear or 1x1 convolution layer with a 2:4 weight.

    Args:
        module: The dense layer, on CUDA.
        dtype: What it computes in.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.matrix = module.weight.detach().flatten(1).to(dtype)
        self.weight = to_sparse_semi_structured(self.matrix.contiguous())
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Rows ``[n, in]`` to rows ``[n, out]``."""
        if not len(x):
            # A head without regions; the kernels take no product of nothing.
            return x.new_zeros(0, self.matrix.shape[0], dtype=self.dtype)
        return F.linear(x.to(self.dtype), self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            rows = x.reshape(-1, x.shape[-1])
            return self.linear(rows).to(x.dtype).reshape(*x.shape[:-1], -1)
        rows, shape = self.rows(x)
        out = self.linear(rows).to(x.dtype)
        return out.reshape(*shape, -1).permute(0, 3, 1, 2)

    def rows(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """A 1x1 convolution's input pixels as rows, and batch, height and width of the output."""
        (top, left), (down, right) = self.module.padding, self.module.stride
        padded = F.pad(x, (left, left, top, top))[:, :, ::down, ::right]
        n, _, height, width = padded.shape
        return padded.permute(0, 2, 3, 1).reshape(-1, padded.shape[1]), (n, height, width)


@torch.no_grad()
def use_semi_structured(model: nn.Module, dtype: torch.dtype = torch.float16) -> list[str]:
    """Gives every eligible layer of a plain model the semi-structured forward.

    Args:
        model: A baked or stock model on CUDA; its eligible layers' ``forward`` is replaced.
        dtype: What they compute in.

    Returns:
        Names of the layers.

    Raises:
        ExportError: Without CUDA, if no layer is eligible, if torch's kernels refuse one, or if
            one computes something else than its dense twin.
    """
    if not torch.cuda.is_available():
        raise ExportError(NEEDS_CUDA)
    names = []
    for name, module in model.named_modules():
        if exportable(module) and not semi_structured_obstacle(module, module.weight, dtype):
            try:
                forward = SemiStructuredForward(module, dtype)
                check_equality(name, forward)
            except ExportError:
                raise
            except RuntimeError as error:
                raise ExportError(
                    f"torch's semi-structured kernels refuse layer '{name}' ({error}); use another"
                    ' backend, or a torch that was built with them'
                ) from error
            module.forward = forward
            names.append(name)
    if not names:
        raise ExportError(
            'no layer meets the conditions of the semi-structured kernels; tools/export.py check'
            ' says why'
        )
    return names


def check_equality(name: str, forward: SemiStructuredForward) -> None:
    """Compares a layer with its dense twin on random rows.

    Raises:
        ExportError: If they differ.
    """
    matrix = forward.matrix
    generator = torch.Generator(matrix.device).manual_seed(0)
    x = torch.randn(CHECKED_ROWS, matrix.shape[1], device=matrix.device, generator=generator)
    dense = F.linear(x.to(forward.dtype), matrix, forward.bias).float()
    error = float((forward.linear(x).float() - dense).norm() / dense.norm().clamp_min(1e-12))
    if not error <= EQUALITY_TOLERANCE:
        raise ExportError(
            f"layer '{name}' differs by {error:.2g} from its dense twin on the semi-structured"
            f' kernel (allowed: {EQUALITY_TOLERANCE:g})'
        )
