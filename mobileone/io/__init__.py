"""Files that are written whole, read safely, and packages that may be missing."""
