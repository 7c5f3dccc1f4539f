"""Makes ``slope_mm.…`` types resolve in any OpenMMLab config without ``custom_imports``.

mmengine imports ``<scope>.registry`` when it meets a scope that it does not know, then asks the
child registry of that scope, which falls back to its parent. Everything of ours is registered in
mmengine's root registries, so the children below stay empty and only give the scope a name.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

_LOCATIONS = ['slope_mm.engine', 'slope_mm.export.detector', 'slope_mm.classification']

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='slope_mm', locations=_LOCATIONS)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='slope_mm', locations=_LOCATIONS)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='slope_mm', locations=_LOCATIONS
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim_wrapper_constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='slope_mm',
    locations=_LOCATIONS,
)
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='slope_mm', locations=_LOCATIONS)
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='slope_mm', locations=_LOCATIONS
)
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='slope_mm', locations=_LOCATIONS)
