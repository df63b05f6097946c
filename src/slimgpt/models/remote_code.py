"""Models whose class comes from their repository: which class that is, and the files that hold it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from slimgpt.errors import ModelError, one_line

AUTO_CONFIG, AUTO_MODEL = "AutoConfig", "AutoModelForCausalLM"

_MODEL_CLASSES: dict[type, type[PreTrainedModel]] = {}
"""By the class of their config. transformers' own register would take them for every folder of that config from then
on, slim ones with a class of their own among them."""


def is_remote(cls: type) -> bool:
    """Whether a class comes from a repository rather than from a library."""
    return cls.__module__.partition(".")[0] == "transformers_modules"


def register_model_class(config: PreTrainedConfig, location: str) -> None:
    """Import the causal LM class that the repository of a config has; :func:`model_class` gives it from here on.

    A slim folder's class is built around the repository's, which is taken.

    Args:
        location: the folder or the hub id that the config was read from, with the user's leave to run its code.

    Raises:
        ModelError: the repository names no such class, or it cannot be imported.
    """
    if not is_remote(type(config)):
        return
    reference = (getattr(config, "auto_map", None) or {}).get(AUTO_MODEL)
    if reference is None:
        raise ModelError(f"{location}: auto_map in its config.json names no {AUTO_MODEL}, so there is nothing to prune")
    try:
        imported: Any = get_class_from_dynamic_module(reference, location)
    except Exception as error:  # whatever the code does when it is imported
        raise ModelError(f"cannot import {reference} from the repository of {location}: {one_line(error)}") from error
    bases = [base for base in imported.__mro__ if base.__name__ != "SlimMixin" and base is not imported]
    own = bases[0] if any(base.__name__ == "SlimMixin" for base in imported.__mro__) else imported
    own.config_class = type(config)  # a module that was imported again has a class of its own of the same name
    _MODEL_CLASSES[type(config)] = own


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal LM class of a repository's config; ``None`` for one of transformers."""
    return _MODEL_CLASSES.get(type(config))


def reference(cls: type) -> str:
    """A class as an ``auto_map`` names it: its file without the suffix, and its name."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def code_files(*classes: type) -> list[Path]:
    """The files of a repository that hold these classes, and those that they import from beside them, sorted."""
    files: set[str] = set()
    for cls in filter(is_remote, classes):
        file = inspect.getfile(cls)
        files |= {file, *get_relative_import_files(file)}
    return sorted(map(Path, files))
