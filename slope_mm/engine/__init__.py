"""The mmengine plug-ins. Importing this package registers them in mmengine's root registries."""

from slope_mm.environment import check_environment

# Says what is missing, where slope_mm itself was imported to read packed files alone.
check_environment()

# ruff: noqa: E402 - everything below needs the packages that were just checked
from slope_mm.engine.calibration import calibrate
from slope_mm.engine.checkpoint import install as install_checkpoint_loader
from slope_mm.engine.hooks import (
    EpochSeedHook,
    SlopeBatchNormHook,
    SlopeCalibrationHook,
    SlopeCheckpointHook,
    SlopeDistillationHook,
    SlopeExportHook,
    SlopeFiniteHook,
    SlopeMeanTeacherHook,
    SlopeMonitorHook,
    SlopeScheduleHook,
    SlopeStepInitHook,
)
from slope_mm.engine.model import SlopeModel
from slope_mm.engine.optim_constructor import SlopeOptimWrapperConstructor
from slope_mm.engine.optim_wrapper import (
    RegularizedOptimWrapper,
    SlopeAmpOptimWrapper,
    SlopeOptimWrapper,
)
from slope_mm.engine.packed import load_packed, save_packed
from slope_mm.engine.regularization import regularization
from slope_mm.engine.storage import install as install_file_backend

__all__ = [
    'EpochSeedHook',
    'RegularizedOptimWrapper',
    'SlopeAmpOptimWrapper',
    'SlopeBatchNormHook',
    'SlopeCalibrationHook',
    'SlopeCheckpointHook',
    'SlopeDistillationHook',
    'SlopeExportHook',
    'SlopeFiniteHook',
    'SlopeMeanTeacherHook',
    'SlopeModel',
    'SlopeMonitorHook',
    'SlopeOptimWrapper',
    'SlopeOptimWrapperConstructor',
    'SlopeScheduleHook',
    'SlopeStepInitHook',
    'calibrate',
    'install_checkpoint_loader',
    'install_file_backend',
    'load_packed',
    'regularization',
    'save_packed',
]
