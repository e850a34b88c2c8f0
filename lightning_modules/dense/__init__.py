"""Training of detection and segmentation networks: an optional task that the core never imports."""
