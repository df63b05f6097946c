"""Scan over sizes of a model: losses against the share removed."""
