"""The compiled weight pass against the plain one, on random weights of several layers."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_mm.ops import NMPattern, compress_with_powers, mse_init_step, nm_mask, weight_codes
from slope_mm.ops.fused import fused, fused_enabled


def both_ways(w: Tensor, step: Tensor, bits: int, name: str) -> list[Tensor]:
    latent, learned = w.clone().requires_grad_(), step.clone().requires_grad_()
    codes = weight_codes(name, bits)
    compressed, powers = compress_with_powers(latent, learned, codes, pattern=NMPattern(2, 4))
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    ((compressed * upstream).sum() + (powers * 0.01).sum()).backward()
    assert latent.grad is not None and learned.grad is not None
    return [compressed.detach(), powers.detach(), latent.grad, learned.grad]


def test_compiled_and_plain_pass_agree() -> None:
    """Ties and rows of zeros included; one kernel serves other shapes, bits and code sets."""
    generator = torch.Generator().manual_seed(0)
    for shape, bits, name in (((16, 8, 3, 3), 4, 'lsq'), ((24, 16, 3, 3), 2, 'odd')):
        w = torch.randn(shape, generator=generator).mul(20).round().div(20)
        w[3] = 0
        step = mse_init_step(w, weight_codes(name, bits), 0, nm_mask(w, 2, 4))
        plain = both_ways(w, step, bits, name)
        with fused():
            assert fused_enabled()
            found = both_ways(w, step, bits, name)
        assert not fused_enabled()
        # Values bit for bit; sums in another order.
        assert torch.equal(plain[0], found[0])
        for expected, other in zip(plain[1:], found[1:], strict=True):
            torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)
