"""mmengine hooks: calibration, schedule, monitor, distillation, packed files, safe runs, others."""

from slope_mm.engine.hooks.batch_norm import SlopeBatchNormHook
from slope_mm.engine.hooks.calibration import SlopeCalibrationHook
from slope_mm.engine.hooks.checkpoint import SlopeCheckpointHook
from slope_mm.engine.hooks.distillation import SlopeDistillationHook
from slope_mm.engine.hooks.export import SlopeExportHook
from slope_mm.engine.hooks.finite import SlopeFiniteHook
from slope_mm.engine.hooks.monitor import SlopeMonitorHook
from slope_mm.engine.hooks.schedule import SlopeScheduleHook
from slope_mm.engine.hooks.seed import EpochSeedHook
from slope_mm.engine.hooks.step_init import SlopeStepInitHook

__all__ = [
    'EpochSeedHook',
    'SlopeBatchNormHook',
    'SlopeCalibrationHook',
    'SlopeCheckpointHook',
    'SlopeDistillationHook',
    'SlopeExportHook',
    'SlopeFiniteHook',
    'SlopeMonitorHook',
    'SlopeScheduleHook',
    'SlopeStepInitHook',
]
