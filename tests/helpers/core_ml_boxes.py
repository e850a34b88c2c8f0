"""What Core ML finds in an image by a detector's package, without Core ML."""

from torchvision.ops import batched_nms, box_convert


def candidates(program, image, *, rounding=True):
    """Confidence (A, classes) and coordinates (A, 4) that the suppression gets: a row an anchor."""
    names = ("raw_confidence", "raw_coordinates")
    confidence, coordinates = program.outputs(image[None], names, rounding=rounding)
    return confidence[0], coordinates[0]


def detect(program, image, suppression):
    """What the pipeline returns for one 8-bit image (3, H, W), best box first.

    A box belongs to the class of its highest confidence, and competes with those of that class
    (`PickTop.perClass` of Core ML's specification).
    """
    confidence, coordinates = candidates(program, image)
    best, labels = confidence.max(dim=1)
    kept = best >= suppression.confidence
    corners = box_convert(coordinates[kept], "cxcywh", "xyxy")
    order = batched_nms(corners, best[kept], labels[kept], suppression.iou)
    return confidence[kept][order], coordinates[kept][order]
