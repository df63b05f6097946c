"""Measured costs of heads and channels."""
