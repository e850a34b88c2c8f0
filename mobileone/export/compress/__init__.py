"""Smaller files: `methods` is the table, a file a format has what it does to weights and biases."""
