"""Smaller files without training: `methods` writes and measures them, `coreml` has palettes."""
