"""Columns of a comparison: a model, or several prunings of one that differ by their seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimgpt.errors import UsageError
from slimgpt.models.source import locate


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        label: what stands above it.
        models: as :func:`slimgpt.load` takes them; of several the figures are means.
        labels: what tells these from each other.
    """

    label: str
    models: tuple[str, ...]
    labels: tuple[str, ...]


def columns(base: str, slim: Sequence[str]) -> list[Column]:
    """The columns of a comparison, that of the base first.

    Args:
        base: a model.
        slim: models, or ``NAME=MODEL,MODEL,...`` for several in one column called NAME.

    Raises:
        UsageError: the base is several models, a name or a model is empty, or two columns have the same name.
        SlimGPTError: a model cannot be had.
    """
    given = [_parsed(text) for text in (base, *slim)]
    if len(given[0][1]) > 1:
        raise UsageError(f"'{base}' names several models, and the base is one: all others are held against it")
    models = [model for _, of_column in given for model in of_column]
    labels = dict(zip(models, _labels(models)))
    every = [Column(label or labels[each[0]], each, tuple(labels[model] for model in each)) for label, each in given]
    names = [column.label for column in every]
    for label, _ in given:
        if label and names.count(label) > 1:
            raise UsageError(f"two columns are called '{label}'; give each a NAME of its own, as in NAME=MODEL,MODEL")
    return every


def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    """The name, if one is given, and the models.

    Raises:
        UsageError: one of them is empty.
    """
    name, equals, rest = text.partition("=")
    if not equals or Path(text).expanduser().exists() or os.sep in name:  # a folder may have such a name
        return "", (text,)
    models = tuple(model.strip() for model in rest.split(","))
    if not name.strip() or not all(models):
        raise UsageError(f"'{text}' names no model; give NAME=MODEL,MODEL, such as seeds=slim-0,slim-1,slim-2")
    if len(set(models)) < len(models):
        raise UsageError(f"'{text}' names a model twice; its figures would count twice")
    return name.strip(), models


def _labels(names: Sequence[str]) -> list[str]:
    """The folder names of models; the full name where two models share one."""
    short = {name: locate(name).name for name in dict.fromkeys(names)}
    shared = list(short.values())
    return [short[name] if shared.count(short[name]) == 1 else name for name in names]
