"""Mask and quantize in one operation: values against loops, what is kept, sums beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress_cases import WEIGHTS, random_tensor, slow_compress, slow_nm, steps_for
from torch import Tensor

from slope_mm.errors import RecipeError, TensorError
from slope_mm.ops import (
    CODE_SETS,
    GRADIENTS,
    NMPattern,
    compress_weight,
    compress_with_powers,
    nm_mask,
    power_sums,
    selection,
    step_shape,
    weight_codes,
)

# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('pattern', [None, (2, 4), (4, 8)])
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('name', [None, *CODE_SETS])
def test_the_compressed_weight_is_the_definition(
    kind: str, pattern: tuple[int, int] | None, per_channel: bool, name: str | None
) -> None:
    shape, input_axis, output_axis = WEIGHTS[kind]
    w = random_tensor(shape)
    mask = None if pattern is None else nm_mask(w, *pattern, input_axis)
    slow_mask = None if pattern is None else slow_nm(w.numpy(), *pattern, input_axis)
    codes = None if name is None else weight_codes(name, 3)
    step = None if codes is None else steps_for(shape, output_axis if per_channel else None, codes)
    compressed = compress_weight(w, step, mask, codes)
    expected = slow_compress(w.numpy(), None if step is None else step.numpy(), slow_mask, codes)
    assert tuple(compressed.shape) == shape
    np.testing.assert_array_equal(compressed.numpy(), expected)


@pytest.mark.parametrize('name', CODE_SETS)
def test_masked_weights_are_exact_zeros_and_kept_ones_need_not_be(name: str) -> None:
    """In the set without a zero too; a kept weight may round to zero in the others."""
    w, codes = random_tensor((8, 16, 3, 3)), weight_codes(name, 2)
    mask = nm_mask(w, 2, 4)
    compressed = compress_weight(w, torch.ones(8, 1, 1, 1), mask, codes)
    assert (compressed[~mask] == 0).all()
    assert bool((compressed[mask] == 0).any()) is (name != 'odd')


@pytest.mark.parametrize('name', [None, *CODE_SETS])
def test_the_weight_is_left_alone(name: str | None) -> None:
    w = random_tensor((4, 8))
    before = w.clone()
    codes = None if name is None else weight_codes(name, 4)
    step = None if codes is None else torch.full((4, 1), 0.1)
    for mask in (None, nm_mask(w, 2, 4)):
        compressed = compress_weight(w, step, mask, codes)
        assert compressed.data_ptr() != w.data_ptr()
        compressed.zero_()
        assert torch.equal(w, before)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_compressed_in_fp32(dtype: torch.dtype) -> None:
    codes = weight_codes('lsq', 8)
    w = random_tensor((16, 64)).to(dtype).requires_grad_()
    mask = nm_mask(w, 2, 4)
    step = torch.full((16, 1), 0.0137, requires_grad=True)
    compressed = compress_weight(w, step, mask, codes)
    expected = slow_compress(w.detach().float().numpy(), step.detach().numpy(), mask.numpy(), codes)
    assert compressed.dtype == dtype
    assert torch.equal(compressed, torch.from_numpy(expected).to(dtype))
    compressed.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == dtype
    assert step.grad is not None and step.grad.dtype == torch.float32


@pytest.mark.parametrize('shape', [(1, 4), (1, 1), (4, 1, 3, 3), (1, 4, 1, 1)])
def test_layers_of_one_channel(shape: tuple[int, ...]) -> None:
    w, codes = random_tensor(shape).requires_grad_(), weight_codes('lsq', 4)
    step = torch.full(step_shape(shape, 0), 0.1, requires_grad=True)
    mask = nm_mask(w, 2, 4) if shape[1] == 4 else None
    compress_weight(w, step, mask, codes).sum().backward()
    assert w.grad is not None and w.grad.shape == shape
    assert step.grad is not None and step.grad.shape == step.shape


def test_zero_weights_stay_zero_and_keep_finite_gradients() -> None:
    codes = weight_codes('lsq', 4)
    w = torch.zeros(4, 8, requires_grad=True)
    step = torch.zeros(4, 1, requires_grad=True)
    compressed = compress_weight(w, step, nm_mask(w, 2, 4), codes)
    assert (compressed == 0).all()
    compressed.sum().backward()
    assert w.grad is not None and step.grad is not None
    assert torch.equal(w.grad, torch.ones(4, 8))
    assert torch.equal(step.grad, torch.zeros(4, 1))


def test_weights_of_a_checkpoint_in_channels_last() -> None:
    w = random_tensor((8, 16, 3, 3)).contiguous(memory_format=torch.channels_last)
    codes, step = weight_codes('lsq', 4), torch.full((8, 1, 1, 1), 0.1)
    expected = slow_compress(w.numpy(), step.numpy(), slow_nm(w.numpy(), 2, 4, 1), codes)
    compressed = compress_weight(w, step, nm_mask(w, 2, 4), codes)
    np.testing.assert_array_equal(compressed.numpy(), expected)


@pytest.mark.parametrize('gradient', ['st', 'STE', '', None, ['ste']])
def test_unknown_gradients_are_refused(gradient: object) -> None:
    with pytest.raises(
        RecipeError, match=r"gradient=.*choose one of \['masked', 'soft', 'sr_ste', 'ste'"
    ):
        compress_weight(torch.ones(4, 4), gradient=gradient)  # type: ignore[arg-type]


# --- what a training step keeps alive ------------------------------------------------------------


def kept_alive(compressed: Tensor, saved: list[Tensor]) -> int:
    """Bytes that the graph of one operation holds."""
    assert compressed.grad_fn is not None
    loose = [value for value in vars(compressed.grad_fn).values() if isinstance(value, Tensor)]
    assert not loose, 'tensors on ctx escape the saved-tensor hooks'
    return sum(tensor.untyped_storage().nbytes() for tensor in saved)


@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('name', [None, *CODE_SETS])
def test_backward_keeps_what_the_layer_has_anyway_and_a_bit_a_weight(
    gradient: str, name: str | None
) -> None:
    w = random_tensor((32, 64, 3, 3)).requires_grad_()
    codes = None if name is None else weight_codes(name, 4)
    step = None if codes is None else torch.full((32, 1, 1, 1), 0.1, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compressed, powers = compress_with_powers(
            w, step, codes, pattern=NMPattern(2, 4), gradient=gradient
        )
    # The operator that multiplies with the compressed weight keeps it too.
    allowed = w.nbytes + w.numel() // 8 + compressed.nbytes + powers.nbytes
    allowed += 0 if step is None else step.nbytes
    assert kept_alive(compressed, saved) <= allowed


@pytest.mark.parametrize('inputs', [4, 12, 20, 36])
def test_bits_of_a_mask_end_with_their_row(inputs: int) -> None:
    """Rows that fill no whole bytes: pruned weights get no gradient, kept ones theirs."""
    w = random_tensor((7, inputs)).requires_grad_()
    compressed, _ = compress_with_powers(w, pattern=NMPattern(1, 4), gradient='masked')
    grad = random_tensor(w.shape, 1)
    compressed.backward(grad)
    kept = torch.from_numpy(slow_nm(w.detach().numpy(), 1, 4, 1))
    assert torch.equal(w.grad, grad * kept)


def test_a_weight_that_changed_before_backward_is_noticed() -> None:
    w = random_tensor((4, 8)).requires_grad_()
    loss = compress_weight(w, torch.full((4, 1), 0.1), None, weight_codes('lsq', 4)).sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


# --- the sums beside the compressed weight -------------------------------------------------------


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('name', [*CODE_SETS, None])
@pytest.mark.parametrize('pattern', [NMPattern(2, 4), None])
def test_sums_and_their_exact_gradient_are_those_of_fixed_codes(
    kind: str, per_channel: bool, name: str | None, pattern: NMPattern | None
) -> None:
    """Against plain autograd on ``(code + offset) * step`` with the codes held as constants."""
    shape, input_axis, output_axis = WEIGHTS[kind]
    codes = None if name is None else weight_codes(name, 3)
    w = random_tensor(shape).requires_grad_()
    step = None
    if codes is not None:
        step = steps_for(shape, output_axis if per_channel else None, codes).requires_grad_()
    compressed, powers = compress_with_powers(
        w, step, codes, pattern=pattern, axes=(output_axis, input_axis), grad_scale=0.3
    )
    mask = None if pattern is None else nm_mask(w, 2, 4, input_axis)
    torch.testing.assert_close(compressed, compress_weight(w, step, mask, codes), rtol=0, atol=0)
    expected = power_sums(w, compressed.detach(), output_axis)
    torch.testing.assert_close(powers, expected, rtol=1e-5, atol=1e-6)

    upstream = random_tensor(tuple(powers.shape), seed=4)
    powers.backward(upstream)
    latent = w.detach().double().requires_grad_()
    if step is None:
        constant, scale = compressed.detach().double(), None
    else:
        scale = step.detach().double().requires_grad_()
        constant = (compressed.detach() / step.detach()).double() * scale
    a, b = (x.movedim(output_axis, 0).flatten(1) for x in (latent, constant))
    sums = torch.stack([(a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])
    sums.backward(upstream.double())
    assert latent.grad is not None and w.grad is not None
    torch.testing.assert_close(w.grad.double(), latent.grad, rtol=1e-5, atol=1e-5)
    if scale is not None and step is not None:
        assert scale.grad is not None and step.grad is not None
        torch.testing.assert_close(step.grad.double(), 0.3 * scale.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('gradient', [name for name in GRADIENTS if name != 'soft'])
@pytest.mark.parametrize('name', [*CODE_SETS, None])
@pytest.mark.parametrize('n, m', [(2, 4), (1, 4), (4, 8), (2, 16), (3, 6)])
def test_live_masks_are_as_good_as_given_ones(
    n: int, m: int, name: str | None, gradient: str
) -> None:
    """Live N:M, in blocks, against a stored mask; both gradients at once."""
    codes = None if name is None else weight_codes(name, 2)
    results = []
    for live in (True, False):
        # More than one block of rows, with a shorter last one, ties and a row of zeros.
        w = random_tensor((301, 48 * 3, 3, 3)).mul(20).round().div(20)
        w[7] = 0
        w.requires_grad_()
        step = None if codes is None else steps_for(w.shape, 0, codes).requires_grad_()
        mask = None if live else nm_mask(w, n, m)
        pattern = NMPattern(n, m) if live else None
        compressed, powers = compress_with_powers(
            w, step, codes, pattern=pattern, mask=mask, gradient=gradient
        )
        both = (compressed * random_tensor(w.shape, 1)).sum() + (powers * 0.1).sum()
        both.backward()
        results.append((compressed, powers, w.grad, None if step is None else step.grad))
    for live, stored in zip(*results, strict=True):
        torch.testing.assert_close(live, stored, rtol=0, atol=0)


def test_blocks_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = weight_codes('lsq', 4)
    results = []
    for size in (64, 10**9):
        monkeypatch.setattr(selection, 'BLOCK', size)
        w = random_tensor((40, 16, 3, 3)).requires_grad_()
        step = steps_for(w.shape, 0, codes).requires_grad_()
        compressed, powers = compress_with_powers(w, step, codes, pattern=NMPattern(2, 4))
        ((compressed**2).sum() + powers.sum()).backward()
        results.append((compressed, powers, w.grad, step.grad))
    for small, whole in zip(*results, strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-6)


def test_steps_that_do_not_say_their_axis_are_refused() -> None:
    with pytest.raises(TensorError, match=r'do not say which axis of \(8, 8\)'):
        compress_weight(torch.ones(8, 8), torch.ones(8), None, weight_codes('lsq', 4))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(TensorError, match=r'a mask of shape \(4, 4, 2\)'):
        compress_weight(torch.ones(4, 8), None, torch.ones(4, 4, 2, dtype=torch.bool))


def test_steps_that_fit_no_axis_are_refused() -> None:
    w, codes = torch.ones(4, 8), weight_codes('lsq', 4)
    with pytest.raises(TensorError, match=r'steps of shape \(8, 1\)'):
        compress_with_powers(w, torch.ones(8, 1), codes)
    with pytest.raises(TensorError, match='not divisible by 16'):
        compress_with_powers(w, torch.ones(4, 1), codes, pattern=NMPattern(2, 16))
