"""How much is unfolded at once, so that the windows of a convolution stay in a core's cache.

Nine copies of a large map, or of the features of all RoIs, do not fit there; written to memory and
read back, they take longer than the product itself. A map is cut into strips of rows within the
graph, RoIs are handed to the graph a few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from onnx import NodeProto, helper

# Bytes of a strip's windows: an L2 cache also has to hold the weights.
STRIP_BYTES = 2 << 20
# A strip of fewer rows copies much of what its neighbours copy.
LEAST_ROWS = 2
ROIS_AT_ONCE = 4


def strip_counts(model: onnx.ModelProto, shape: Sequence[int]) -> dict[str, int]:
    """Into how many strips of rows each convolution is to be cut.

    Args:
        model: A graph whose convolutions have 8-bit inputs; it is left as it is.
        shape: Shape of an input, ``[n, c, h, w]``. Other sizes get the same number of strips, which
            are then higher or lower.

    Returns:
        Counts above 1 by the name of the convolution's output.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for size, given in zip(sized.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        size.dim_value = given
    maps = _inferred(sized)
    counts = {}
    for node in model.graph.node:
        image = maps.get(node.input[0], []) if node.op_type == 'Conv' else []
        # Several images (or RoIs) are better cut between them; 0 stands for an unknown size.
        if len(image) == 4 and image[0] == 1 and all(image):
            count = _strips(node, image)
            if count > 1:
                counts[node.output[0]] = count
    return counts


def fixed_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Height and width of the maps (by name) whose size does not depend on the input's."""
    return {
        name: (shape[2], shape[3])
        for name, shape in _inferred(model).items()
        if len(shape) == 4 and shape[2] and shape[3]
    }


def _inferred(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of what nodes give, by name; 0 stands for an unknown size."""
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    return {x.name: [size.dim_value for size in x.type.tensor_type.shape.dim] for x in known}


def _strips(node: NodeProto, image: list[int]) -> int:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    positions = math.prod(given['kernel_shape'])
    if positions == 1:
        return 1
    _, channels, height, width = image
    rows, columns = (
        size // step for size, step in zip((height, width), given['strides'], strict=True)
    )
    wanted = math.ceil(rows * columns * channels * positions / STRIP_BYTES)
    return max(1, min(wanted, rows // LEAST_ROWS))


def rois_at_once(cpu: onnx.ModelProto) -> int | None:
    """How many RoIs a head's graph for the CPU provider is fastest with; None for all of them.

    A head whose results are maps is made of convolutions; one with fully connected layers would
    read their large weights again for every few RoIs.
    """
    unfolds = any(node.op_type == 'MatMulIntegerToFloat' for node in cpu.graph.node)
    maps = all(len(output.type.tensor_type.shape.dim) == 4 for output in cpu.graph.output)
    return ROIS_AT_ONCE if unfolds and maps else None
