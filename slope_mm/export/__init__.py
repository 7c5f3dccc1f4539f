"""ONNX: a detector's heavy parts as quantized graphs, and detectors that run them.

Needs onnx and onnxruntime (the extra ``export``); :func:`require_runtime` asks for
them, and importing this package alone does not.
"""

import importlib

from slope_mm.errors import ExportError


def require_runtime() -> None:
    """Asks for the packages that exporting and running exports need.

    Raises:
        ExportError: Names one that is missing.
    """
    for name in ('onnx', 'onnxruntime'):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f'{name} cannot be imported ({error}): exporting to ONNX and running exports need'
                ' it; install it with: python -m pip install onnx onnxruntime ml_dtypes'
            ) from None
