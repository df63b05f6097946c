"""The finished rows beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimgpt.reproducing.recipe import Recipe

if TYPE_CHECKING:
    from slimgpt.reproducing.result import Result


def columns(results: Sequence[Result]) -> list[str]:
    """The columns of a table in the order in which rows bring them."""
    return list(dict.fromkeys(name for result in results for name in result.figures))


def cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The head and the body of the table: a column ``paper`` follows every one that the paper states a figure for."""
    head, body = ["row"], [[result.name] for result in results]
    for column in columns(results):
        head.append(column)
        stated = any(column in result.paper for result in results)
        head += ["paper"] if stated else []
        for result, line in zip(results, body):
            line.append(number(result.figures.get(column)))
            line += [number(result.paper.get(column))] if stated else []
    return head, body


def table(recipe: Recipe, results: Sequence[Result]) -> str:
    """Markdown."""
    head, body = cells(results)
    models = ", ".join(f"`{model}`" for model in dict.fromkeys(row.model for row in recipe.rows))
    lines = [f"# {recipe.title}", ""]
    if recipe.tiny:
        lines += ["The tiny variant, which shows that the recipe runs. Its figures say nothing about the paper's.", ""]
    lines += [f"Model: {models}. {recipe.note}".strip(), ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """A figure for a reader: whole numbers with commas, four digits of others, nothing for none."""
    if value is None:
        return ""
    if float(value).is_integer() and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
