"""Values that are refused before torch is imported, which takes seconds; what needs a model is checked later.

Checks go by the names of parameters, which mean the same in nearly all commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from slimgpt.errors import ExportError, ModelError, PlanError, UsageError
from slimgpt.runtime.setting_checks import (
    check_at_least_one,
    check_dtype,
    check_not_negative,
    check_positive,
    check_ratio,
    check_seed,
)
from slimgpt.runtime.units import parse_bytes

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "npu", "privateuseone")
"""Types of devices that torch may have; whether this machine has one is known later."""

SERVERS = ("hf", "vllm", "llama.cpp", "sglang", "mlx", "onnx")
"""The keys of :data:`slimgpt.planning.engines.PROFILES`, which imports transformers."""

FORMATS = ("gguf", "hf-uniform", "padded", "nemotron-nas", "onnx", "openvino")
"""The keys of :data:`slimgpt.exporting.run.FORMATS`, which imports torch."""

RUNNERS = ("transformers", "vllm", "mlx", "llama.cpp", "openvino", "onnxruntime")
"""The keys of :data:`slimgpt.exporting.engine_process.INSTALL`."""

EVALUATORS = ("auto", "transformers", "llama.cpp")
"""Values of ``evaluate --engine``: :data:`slimgpt.evaluation.llama_cpp.ENGINES`."""

BOS = ("auto", "once", "window")
"""Those of :data:`slimgpt.evaluation.perplexity.BOS`."""

MOST_SAMPLES = 4
"""Questions that :data:`slimgpt.evaluation.samples.QUESTIONS` has."""

Check = Callable[[str, Any], None]


def _one_of(names: Iterable[str], error: type[UsageError] | type[ExportError]) -> Check:
    def check(name: str, value: str) -> None:
        if value not in names:
            raise error(f"{name} '{value}' is unknown; choose {', '.join(names)}")

    return check


def _engines(_name: str, value: str) -> None:
    for engine in value.split(","):
        if engine.strip() not in SERVERS:
            raise PlanError(f"engine '{engine.strip()}' is unknown; choose {', '.join(SERVERS)}")


def _device(name: str, value: str) -> None:
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", value):
        raise UsageError(f"{name} '{value}' cannot be used here; choose auto, cpu, cuda, cuda:1 or mps")


def _memory(_name: str, value: str | bool) -> None:
    if isinstance(value, str):  # of `speed` it is a switch
        parse_bytes(value)


def _window(name: str, value: int | str) -> None:
    if isinstance(value, int) and value < 2:
        raise UsageError(f"{name} {value} is too small: a window of n tokens predicts n - 1 of them")


def _count(name: str, value: int | str) -> None:
    if isinstance(value, int):  # of `compare` and `speed` some are lists
        check_at_least_one(name, value)


def _samples(name: str, value: int) -> None:
    if not 0 <= value <= MOST_SAMPLES:
        raise UsageError(f"{name} is {value}; it must be from 0 to {MOST_SAMPLES}")


def _file(name: str, value: str | Path) -> None:
    if not Path(value).is_file():
        raise UsageError(f"{name} '{value}' is no file; give the path of one")


def _data_folder(_name: str, value: Path) -> None:
    if not value.is_dir():
        raise UsageError(f"the data folder {value} does not exist")


def _model(_name: str, value: str | Path) -> None:
    """Refuse a path that leads nowhere; what may be a hub id is looked up later."""
    path, text = Path(value).expanduser(), str(value)
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"no such GGUF file: {path}")
    is_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if is_path and not path.exists():
        raise ModelError(f"no such folder: {path}")


def _slim(_name: str, value: Path) -> None:
    if not value.exists():
        raise ModelError(f"no such folder: {value}")


def _models(name: str, value: Iterable[str]) -> None:
    for entry in value:
        for folder in entry.partition("=")[2].split(",") if "=" in entry else [entry]:
            _model(name, folder)


CHECKS: Mapping[str, Check] = {
    "against": _model,
    "base": _model,
    "batch": _count,
    "batch_size": _count,
    "bos": _one_of(BOS, UsageError),
    "data_dir": _data_folder,
    "device": _device,
    "dtype": check_dtype,
    "engines": _engines,
    "export_to": _one_of(FORMATS, ExportError),
    "limit": _count,
    "long": _window,
    "max_kl": check_positive,
    "max_tokens": _count,
    "memory": _memory,
    "model": _model,
    "new_tokens": _count,
    "num_fewshot": check_not_negative,
    "num_samples": _count,
    "plan": _file,
    "prompt": _count,
    "prompts": _file,
    "ratio": check_ratio,
    "rounds": _count,
    "samples": _samples,
    "seed": check_seed,
    "seeds": _count,
    "seq_len": _count,
    "slim": _models,
    "stride": _count,
    "teacher": _model,
    "to": _one_of(FORMATS, ExportError),
    "tolerance": check_not_negative,
    "window": _window,
}
"""By the name of a parameter."""

OF_COMMANDS: Mapping[tuple[str, str], Check | None] = {
    ("evaluate", "engine"): _one_of(EVALUATORS, UsageError),
    ("export", "slim"): _slim,
    ("generate", "prompt"): None,  # the text
    ("recover", "slim"): _slim,
    ("verify", "against"): _slim,
    ("verify", "engine"): _one_of(RUNNERS, UsageError),
    ("verify", "exported"): _slim,
}
"""Of parameters that mean something else in a command."""


def check_values(command: str, values: Mapping[str, Any]) -> None:
    """Refuse values that are wrong for every model.

    Args:
        command: its name.
        values: by the names of its parameters; what was not given is ``None``.

    Raises:
        SlimGPTError: the first of them.
    """
    for name, value in values.items():
        check = OF_COMMANDS.get((command, name), CHECKS.get(name))
        if check is not None and value is not None:
            check(name, value)


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library with the settings that it names as they are typed: ``num_samples`` as ``--num-samples``.

    A name of one word is a setting at the beginning, and in a list of what is to be added or left out.

    Args:
        flags: of the command's options, by the names of their parameters.
    """

    def flag(match: re.Match[str]) -> str:
        return flags.get(match[0], match[0])

    def listed(match: re.Match[str]) -> str:
        return re.sub(r"(?:(?<=^)|(?<=, )|(?<= and )|(?<= or ))[a-z]+(?=$|,| and | or )", flag, match[0])

    message = re.sub(r"(?<![\w./'-])[a-z]+(?:_[a-z]+)+(?![\w./'-])", flag, message)
    message = re.sub(r"^[a-z]+(?= (?:is|says|and)\b| ['(\[-]| \d)", flag, message)
    message = re.sub(r"(?<= and )[a-z]+(?= (?:were given|both)\b)", flag, message)
    return re.sub(r"(?:(?<=\badd )|(?<=\bleave out ))[^;.]+$", listed, message)
