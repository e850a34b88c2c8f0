"""Use of a finished network: labels for folders of images, and smaller files."""
