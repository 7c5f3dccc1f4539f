"""Random small networks and recipes for them. A kind of layer is one row of PIECES."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from mmcv.cnn.bricks import wrappers
from recipe_cases import ACTIVATIONS, GRADIENTS, ORDERS, WEIGHTS
from torch import Tensor, nn

CHANNELS = (3, 4, 6, 8, 12, 16, 24, 32)


class OnChannels(nn.Module):
    """A layer of features ``[..., channels]`` between layers of images ``[N, channels, H, W]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: with channels last, torch itself (2.1 and 2.13, on AVX2) writes past a buffer
        # in the backward pass of a strided 1x1 convolution of few channels: docs/setup.md.
        return self.layer(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class SelfAttention(nn.Module):
    """Attention of all positions of an image to each other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return x + self.attention(tokens, tokens, tokens)[0].mT.reshape(x.shape)


Draw = Callable[[Any], Any]
# A row: a module of `inputs` channels for one of about `outputs`, and how many it came to.
PIECES: dict[str, Callable[[Draw, int, int], tuple[nn.Module, int]]] = {}


def piece(make: Callable[[Draw, int, int], tuple[nn.Module, int]]) -> Any:
    PIECES[make.__name__] = make
    return make


def _conv(draw: Draw, kind: type[nn.Conv2d], inputs: int, outputs: int) -> nn.Conv2d:
    size = draw(st.sampled_from([1, 3]))
    return kind(
        inputs,
        outputs,
        size,
        stride=draw(st.sampled_from([1, 2])),
        padding=size // 2,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(['zeros', 'replicate'])),
    )


@piece
def conv(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    return _conv(draw, nn.Conv2d, inputs, outputs), outputs


@piece
def mmcv_conv(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    return _conv(draw, wrappers.Conv2d, inputs, outputs), outputs


@piece
def depthwise(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    return nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), inputs


@piece
def grouped(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    groups = 2 if inputs % 2 == 0 and outputs % 2 == 0 else 1
    return nn.Conv2d(inputs, outputs, 1, groups=groups), outputs


@piece
def up(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=draw(st.booleans())), outputs


@piece
def linear(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    kind = draw(st.sampled_from([nn.Linear, wrappers.Linear]))
    return OnChannels(kind(inputs, outputs, bias=draw(st.booleans()))), outputs


@piece
def normed(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    block = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    return block, outputs


@piece
def attention(draw: Draw, inputs: int, outputs: int) -> tuple[nn.Module, int]:
    return SelfAttention(inputs, 2 if inputs % 2 == 0 else 1), inputs


class RandomNet(nn.Module):
    """Pieces one after the other; some run twice, some are known by a second name."""

    def __init__(self, order: list[int], pieces: list[nn.Module], alias: int | None) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.order = order
        if alias is not None:
            self.again = pieces[alias]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.relu(self.pieces[index](x))
            if x.shape[-1] > 12:
                x = nn.functional.max_pool2d(x, 2)
        return x


def image(inputs: int) -> Tensor:
    return torch.randn(2, inputs, 6, 6)


@st.composite
def nets(draw: Draw) -> Callable[[], tuple[RandomNet, int]]:
    """A function that builds the same network again, weights included, and its input channels."""
    seed = draw(st.integers(0, 2**31 - 1))
    first = draw(st.sampled_from(CHANNELS))
    names = draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=5))
    torch.manual_seed(seed)
    channels, pieces, order = first, [], []
    for name in names:
        outputs = draw(st.sampled_from(CHANNELS))
        module, made = PIECES[name](draw, channels, outputs)
        pieces.append(module)
        order.append(len(pieces) - 1)
        if made == channels and draw(st.booleans()):
            order.append(len(pieces) - 1)
        channels = made
    alias = draw(st.none() | st.integers(0, len(pieces) - 1))
    net = RandomNet(order, pieces, alias)
    state = {key: value.clone() for key, value in net.state_dict().items()}

    def build() -> tuple[RandomNet, int]:
        twin = copy.deepcopy(net)
        twin.load_state_dict(state)
        return twin, first

    return build


# --- recipes -------------------------------------------------------------------------------------

SPARSE = st.sampled_from([None, '2:4', '2:4', '1:2', '1:4', '2:8', '2:16', 'unstructured:0.3'])
WEIGHT = WEIGHTS.flatmap(
    lambda weight: SPARSE.map(lambda sparsity: {'bits': 4, 'sparsity': sparsity, **weight})
)


def recipes_for(net: nn.Module) -> Any:
    """Well-formed recipes; a rule may match or leave nothing, a pattern may fit no layer."""
    layers = {name: module for name, module in net.named_modules() if hasattr(module, 'weight')}
    kinds = sorted({f'type:{type(module).__name__}' for module in layers.values()})
    rules = st.fixed_dictionaries(
        dict(match=st.sampled_from([*layers, *kinds, 're:.*', 'in:8'])),
        optional=dict(
            weight=WEIGHTS,
            activation=ACTIVATIONS,
            gradient=GRADIENTS,
            order=ORDERS,
            compress=st.booleans(),
        ),
    )
    return st.fixed_dictionaries(
        dict(weight=WEIGHT),
        optional=dict(
            activation=ACTIVATIONS,
            gradient=GRADIENTS,
            order=ORDERS,
            rules=st.lists(rules, max_size=2),
        ),
    )


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(['2:4', 'lsq', 're:(', 're:[', 'type:', 'in:x', '5:4', 'unstructured:nan']),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(['bits', 'match', 'x', 1]), st.integers(0, 9), max_size=2),
    st.just(b'2:4'),
    st.just(object()),
)


@st.composite
def spoilt(draw: Draw, recipes: Any) -> Any:
    """A recipe of which some part is replaced, added or removed."""
    recipe = draw(recipes)
    recipe = json.loads(json.dumps(recipe))
    for _ in range(draw(st.integers(1, 2))):
        places: list[tuple[Any, Any]] = []

        def walk(part: Any, places: list[tuple[Any, Any]] = places) -> None:
            keys = part if isinstance(part, dict) else range(len(part))
            for key in keys:
                places.append((part, key))
                if isinstance(part[key], (dict, list)):
                    walk(part[key])

        walk(recipe)
        kind = draw(st.sampled_from(['replace', 'replace', 'remove', 'add']))
        if not places:
            break
        part, key = draw(st.sampled_from(places))
        if kind == 'replace':
            part[key] = draw(JUNK)
        elif kind == 'remove':
            del part[key]
        elif isinstance(part, dict):
            part[draw(st.sampled_from(['wieght', 'bits', 'match', 'extra', 'rules']))] = draw(JUNK)
    return recipe
