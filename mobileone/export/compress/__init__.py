"""Smaller files, and what is done so that they keep the accuracy."""
