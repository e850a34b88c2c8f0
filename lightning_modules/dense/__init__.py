"""Training of detection and segmentation networks."""
