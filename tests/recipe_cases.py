"""What the tests of recipes share: a net with names as detectors have them, and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from torch import nn

import slope_mm
from slope_mm.layers import LayerSpec

CONFIGS = Path(__file__).parents[1] / 'configs'
WEIGHT = dict(sparsity='2:4', bits=4)
W4A4 = dict(weight=WEIGHT, activation=dict(bits=4))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 1)


class Net(nn.Module):
    """Names as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, 8, 3)
        self.backbone.layer1 = nn.Sequential(Block(8), Block(8))
        self.backbone.layer10 = Block(16)
        self.neck = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 8, 2))
        self.head = nn.Module()
        self.head.fc = nn.Linear(32, 16)
        self.head.fc_cls = nn.Linear(16, 5)


def specs(recipe: dict[str, Any], model: nn.Module | None = None) -> dict[str, LayerSpec | None]:
    return {p.name: p.spec for p in slope_mm.plan(model or Net(), recipe)}


SPARSITIES = st.none() | st.sampled_from(['2:4', '1:2', '2:8', '2:16', '4:8', '7:32']) | st.floats(
    1e-12, 1
).map(lambda share: f'unstructured:{share}')  # fmt: skip
BITS = st.none() | st.integers(2, 8)
WEIGHTS = st.fixed_dictionaries(
    {},
    optional=dict(
        sparsity=SPARSITIES,
        bits=BITS,
        codes=st.sampled_from(['lsq', 'symmetric', 'odd']),
        step=st.sampled_from(['channel', 'tensor']),
    ),
)
ACTIVATIONS = st.none() | st.fixed_dictionaries({}, optional=dict(bits=BITS))
GRADIENTS = st.sampled_from(['ste', 'sr_ste', 'masked'])
ORDERS = st.sampled_from(['s_then_q', 'q_then_s'])
MATCHES = st.sampled_from(['head', 'backbone.layer1', 're:.*conv1', 'type:Linear', 'in:16'])
RULES = st.fixed_dictionaries(
    dict(match=MATCHES),
    optional=dict(
        weight=WEIGHTS,
        activation=ACTIVATIONS,
        gradient=GRADIENTS,
        order=ORDERS,
        compress=st.booleans(),
    ),
)
RECIPES = st.fixed_dictionaries(
    dict(weight=WEIGHTS.map(lambda weight: {'bits': 4, **weight, 'sparsity': '2:4'})),
    optional=dict(
        activation=ACTIVATIONS, gradient=GRADIENTS, order=ORDERS, rules=st.lists(RULES, max_size=4)
    ),
)
