"""Pruning layer by layer; the only package that makes a model narrower."""

from slimgpt.pruning.report import ExpertsReport, LayerReport, PruneReport

__all__ = ["ExpertsReport", "LayerReport", "PruneReport"]
