# The hooks of a SLOPE run. A config's list of custom hooks replaces its base's, so a project with
# hooks of its own adds these to its list.
slope_hooks = [
    dict(type='slope_mm.EpochSeedHook'),
    dict(type='slope_mm.SlopeCalibrationHook', batches=4),
    dict(type='slope_mm.SlopeScheduleHook'),
    dict(type='slope_mm.SlopeFiniteHook'),
    dict(type='slope_mm.SlopeMonitorHook', interval=25),
]
custom_hooks = [dict(type='slope_mm.EpochSeedHook')]
