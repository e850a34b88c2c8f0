"""Detection and segmentation on the family's features, with the heads of other libraries."""

from mobileone.dense.detection import ssdlite
from mobileone.dense.fusing import fuse
from mobileone.dense.segmentation import SEGMENTERS, deeplabv3, segmenter

__all__ = ["SEGMENTERS", "deeplabv3", "fuse", "segmenter", "ssdlite"]
