"""Time and memory of a training step, one process an implementation."""
