"""Checks of a written file: numbers, structure and weights against the network."""
