"""Curves, sample predictions and the worst images of a run."""
