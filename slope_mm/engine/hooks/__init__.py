"""mmengine hooks: calibration, schedule, monitor, reproducible epochs. One concern each."""

from slope_mm.engine.hooks.calibration import SlopeCalibrationHook
from slope_mm.engine.hooks.monitor import SlopeMonitorHook
from slope_mm.engine.hooks.schedule import SlopeScheduleHook
from slope_mm.engine.hooks.seed import EpochSeedHook

__all__ = ['EpochSeedHook', 'SlopeCalibrationHook', 'SlopeMonitorHook', 'SlopeScheduleHook']
