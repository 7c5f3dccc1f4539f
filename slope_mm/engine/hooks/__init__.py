"""mmengine hooks: calibration, schedule, monitor, packed files, reproducible and safe runs."""

from slope_mm.engine.hooks.calibration import SlopeCalibrationHook
from slope_mm.engine.hooks.checkpoint import SlopeCheckpointHook
from slope_mm.engine.hooks.export import SlopeExportHook
from slope_mm.engine.hooks.finite import SlopeFiniteHook
from slope_mm.engine.hooks.monitor import SlopeMonitorHook
from slope_mm.engine.hooks.schedule import SlopeScheduleHook
from slope_mm.engine.hooks.seed import EpochSeedHook

__all__ = [
    'EpochSeedHook',
    'SlopeCalibrationHook',
    'SlopeCheckpointHook',
    'SlopeExportHook',
    'SlopeFiniteHook',
    'SlopeMonitorHook',
    'SlopeScheduleHook',
]
