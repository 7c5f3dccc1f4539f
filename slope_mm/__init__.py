"""SLOPE for stock OpenMMLab detection: N:M sparse, 2 to 4 bit, trained with a cosine regularizer.

Importing the package registers its plug-ins with mmengine, and makes checkpoints safe to read and
whole when they are written. Where torch or an mm* package is missing or unusable, packed files can
be read all the same (``read_packed``), and everything else says what is missing when it is asked
for.
"""

from typing import Any

from slope_mm.environment import check_environment
from slope_mm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    ExportError,
    PackedFileError,
    RecipeError,
    SlopeError,
    StorageError,
    TensorError,
)
from slope_mm.version import __version__

_problem: EnvironmentProblem | None = None
try:
    check_environment()
except EnvironmentProblem as problem:
    _problem = problem
else:
    from slope_mm.analysis.report import Report, report
    from slope_mm.convert import bake, compressed_layers, convert, plan
    from slope_mm.engine import (
        EpochSeedHook,
        SlopeAmpOptimWrapper,
        SlopeBatchNormHook,
        SlopeCalibrationHook,
        SlopeCheckpointHook,
        SlopeDistillationHook,
        SlopeExportHook,
        SlopeFiniteHook,
        SlopeMeanTeacherHook,
        SlopeModel,
        SlopeMonitorHook,
        SlopeOptimWrapper,
        SlopeOptimWrapperConstructor,
        SlopeScheduleHook,
        SlopeStepInitHook,
        calibrate,
        install_checkpoint_loader,
        install_file_backend,
        load_packed,
        regularization,
        save_packed,
    )
    from slope_mm.folding import fold_batch_norms
    from slope_mm.recipe import Recipe

    install_checkpoint_loader()
    install_file_backend()

__all__ = [
    'CheckpointError',
    'ConfigError',
    'DataError',
    'EnvironmentProblem',
    'EpochSeedHook',
    'ExportError',
    'PackedFileError',
    'Recipe',
    'RecipeError',
    'Report',
    'SlopeAmpOptimWrapper',
    'SlopeBatchNormHook',
    'SlopeCalibrationHook',
    'SlopeCheckpointHook',
    'SlopeDistillationHook',
    'SlopeError',
    'SlopeExportHook',
    'SlopeFiniteHook',
    'SlopeMeanTeacherHook',
    'SlopeModel',
    'SlopeMonitorHook',
    'SlopeOptimWrapper',
    'SlopeOptimWrapperConstructor',
    'SlopeScheduleHook',
    'SlopeStepInitHook',
    'StorageError',
    'TensorError',
    '__version__',
    'bake',
    'calibrate',
    'compressed_layers',
    'convert',
    'fold_batch_norms',
    'load_packed',
    'plan',
    'read_packed',
    'regularization',
    'report',
    'save_packed',
]


def __getattr__(name: str) -> Any:
    if name == 'read_packed':
        # Not imported above: the environment check must not need safetensors.
        from slope_mm.packing.reader import read_packed

        return read_packed
    if _problem is not None and name in __all__:
        raise _problem
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
