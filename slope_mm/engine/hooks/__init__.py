"""mmengine hooks: calibration, schedule, monitor, packed files, reproducible epochs, teachers."""

from slope_mm.engine.hooks.calibration import SlopeCalibrationHook
from slope_mm.engine.hooks.export import SlopeExportHook
from slope_mm.engine.hooks.mean_teacher import SlopeMeanTeacherHook
from slope_mm.engine.hooks.monitor import SlopeMonitorHook
from slope_mm.engine.hooks.schedule import SlopeScheduleHook
from slope_mm.engine.hooks.seed import EpochSeedHook

__all__ = [
    'EpochSeedHook',
    'SlopeCalibrationHook',
    'SlopeExportHook',
    'SlopeMeanTeacherHook',
    'SlopeMonitorHook',
    'SlopeScheduleHook',
]
