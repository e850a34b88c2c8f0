"""Recipes as documents: one YAML file a variant."""
