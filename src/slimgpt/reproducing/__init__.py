"""The paper's tables, row by row."""

from slimgpt.reproducing.recipe import Evaluation, Recipe, Row, read_recipe
from slimgpt.reproducing.result import Result
from slimgpt.reproducing.run import reproduce

__all__ = ["Evaluation", "Recipe", "Result", "Row", "read_recipe", "reproduce"]
