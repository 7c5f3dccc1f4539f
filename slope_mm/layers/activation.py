"""The A of A4/W4: LSQ on the input of a compressed layer, with a calibrated range and sign."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_mm.ops import Codes, activation_codes, grad_scale, lsq_quantize, mse_init_step

# Values kept per observed call and per layer: enough to place a clip range, small enough to hold
# for every layer of a detector at once.
SAMPLES_PER_CALL = 2048
MAX_SAMPLES = 16384

UNCALIBRATED, UNSIGNED, SIGNED = -1, 0, 1


def quantize_activation(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """Quantizes a layer's input per tensor.

    The step's gradient is scaled by the number of features of one sample, since losses are means
    over the batch.

    Args:
        x: Input, batch first.
        step: Learned step of shape [1].
        codes: From :func:`~slope_mm.ops.activation_codes`.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    features = x.numel() / max(x.shape[0], 1)
    return lsq_quantize(x, step, codes.qn, codes.qp, grad_scale(features, codes), codes.offset)


class ActivationObserver:
    """Collects a bounded sample of what a layer's input looks like.

    Attributes:
        low: Smallest value seen (0-dim tensor), or None before the first call.
        samples: Sampled values of every observed call.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.samples: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Records one input; empty ones (no RoI in an image) say nothing."""
        if x.numel() == 0:
            return
        flat = x.detach().float().reshape(-1)
        low = flat.min()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        if self._count < MAX_SAMPLES:
            # An odd stride does not run along one column of the feature map.
            stride = max(1, flat.numel() // SAMPLES_PER_CALL) | 1
            sample = flat[::stride][:SAMPLES_PER_CALL].clone()
            self.samples.append(sample)
            self._count += sample.numel()

    @property
    def seen(self) -> bool:
        """Whether anything was observed."""
        return self.low is not None


def calibrated_step(samples: Tensor, signed: bool, bits: int) -> Tensor:
    """The step of least squared error on sampled inputs.

    Args:
        samples: Sampled values, flat.
        signed: Whether the input takes negative values.
        bits: Activation bits.

    Returns:
        fp32 step of shape [1].
    """
    return mse_init_step(samples, activation_codes(bits, signed), axis=None).reshape(1)
