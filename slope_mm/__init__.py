"""SLOPE for stock OpenMMLab detection: N:M sparse, 2 to 4 bit, trained with a cosine regularizer.

Importing the package registers its plug-ins with mmengine and makes checkpoint loading safe.
"""

from slope_mm.environment import check_environment

check_environment()

# ruff: noqa: E402 - everything below needs the packages that were just checked
from slope_mm.analysis.report import Report, report
from slope_mm.convert import bake, compressed_layers, convert, plan
from slope_mm.engine import (
    EpochSeedHook,
    SlopeAmpOptimWrapper,
    SlopeCalibrationHook,
    SlopeModel,
    SlopeMonitorHook,
    SlopeOptimWrapper,
    SlopeOptimWrapperConstructor,
    SlopeScheduleHook,
    calibrate,
    install_checkpoint_loader,
    regularization,
)
from slope_mm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    RecipeError,
    SlopeError,
    TensorError,
)
from slope_mm.recipe import Recipe
from slope_mm.version import __version__

install_checkpoint_loader()

__all__ = [
    'CheckpointError',
    'ConfigError',
    'DataError',
    'EnvironmentProblem',
    'EpochSeedHook',
    'Recipe',
    'RecipeError',
    'Report',
    'SlopeAmpOptimWrapper',
    'SlopeCalibrationHook',
    'SlopeError',
    'SlopeModel',
    'SlopeMonitorHook',
    'SlopeOptimWrapper',
    'SlopeOptimWrapperConstructor',
    'SlopeScheduleHook',
    'TensorError',
    '__version__',
    'bake',
    'calibrate',
    'compressed_layers',
    'convert',
    'plan',
    'regularization',
    'report',
]
