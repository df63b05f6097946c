"""Reproduction of the paper's tables."""

from slimgpt.reproducing.recipe import Evaluation, Recipe, RecipeRow, read_recipe
from slimgpt.reproducing.result import Result
from slimgpt.reproducing.run import reproduce

__all__ = ["Evaluation", "Recipe", "RecipeRow", "Result", "read_recipe", "reproduce"]
