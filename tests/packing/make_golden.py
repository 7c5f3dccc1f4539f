"""Writes the golden files of the format: PYTHONPATH=. python tests/packing/make_golden.py

They are committed, and never written again: later versions have to read them. The weights are drawn
by numpy, whose generators do not change, so that the test knows them without the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).parent / 'golden'
WEIGHT = dict(sparsity='2:4', bits=4)
# A file each: the recipe, and how it is written.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'enumerative': (dict(weight=WEIGHT, activation=dict(bits=4)), dict(coding='enumerative')),
    'entropy': (dict(weight=dict(sparsity='2:8', bits=3, codes='odd')), dict(coding='entropy')),
    'bitmask': (
        dict(weight=dict(sparsity='unstructured:0.3', bits=2, codes='symmetric', step='tensor')),
        dict(coding='bitmask'),
    ),
    'half': (
        dict(weight=dict(sparsity='2:16'), rules=[dict(match='up', weight=dict(bits=8))]),
        dict(coding='smallest', dtype='float16'),
    ),
    'wide_groups': (
        dict(weight=dict(sparsity='9:20', bits=4), rules=[dict(match='fc', compress=False)]),
        dict(coding='entropy', dtype='bfloat16'),
    ),
    # Version 2: a weight of another key, with three inputs.
    'attention': (dict(weight=WEIGHT, activation=dict(bits=4)), dict(coding='smallest')),
}


class GoldenNet(nn.Module):
    """A convolution with a norm, a transposed convolution, a linear layer under two names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 12, 3, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(channels, 5, 2)
        self.fc = nn.Linear(channels, 7)
        self.alias = self.fc


class GoldenAttention(nn.Module):
    """Attention, and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.fc = nn.Linear(16, 7)


def stock(name: str) -> nn.Module:
    """The stock model of a case."""
    if name == 'attention':
        return GoldenAttention()
    return GoldenNet(40 if name == 'wide_groups' else 16)


def make(name: str) -> nn.Module:
    """The compressed model of a case."""
    import slope_mm

    model = stock(name)
    random = np.random.default_rng(list(CASES).index(name))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                drawn = random.normal(size=tuple(tensor.shape)).astype(np.float32)
                tensor.copy_(torch.from_numpy(drawn))
    slope_mm.convert(model, CASES[name][0])
    for layer in slope_mm.compressed_layers(model).values():
        if layer.slope_step is not None:
            # Not found by a search: that one may be improved.
            shape = tuple(layer.slope_step.shape)
            steps = random.uniform(0.05, 0.5, size=shape).astype(np.float32)
            layer.step.data.copy_(torch.from_numpy(steps))
        if layer.slope_spec.activation_bits is not None:
            layer.slope_act_step.data.fill_(0.25)
            layer.slope_act_signed.fill_(1)
    return model


def main() -> None:
    import slope_mm

    GOLDEN.mkdir(exist_ok=True)
    for name, (_, options) in CASES.items():
        path = GOLDEN / f'{name}.slope'
        if path.exists():
            # Golden files are written once.
            continue
        meta = dict(
            config=dict(model=dict(type='GoldenNet')), dataset_meta=dict(classes=('a', 'b'))
        )
        slope_mm.save_packed(make(name), path, meta, **options)


if __name__ == '__main__':
    main()
