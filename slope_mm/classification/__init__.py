"""A small classifier with its data and metric, for studies that need nothing beside mmengine.

Networks of mmpretrain are used as they are (``configs/classification``); this room is what a stock
detection install can train. Importing it registers it in mmengine's root registries.
"""

from slope_mm.classification.accuracy import TopKAccuracy
from slope_mm.classification.classifier import Classifier
from slope_mm.classification.images import ImageFolders, PackImage

__all__ = ['Classifier', 'ImageFolders', 'PackImage', 'TopKAccuracy']
