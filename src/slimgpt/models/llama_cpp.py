"""GGUF files in llama.cpp, through llama-cpp-python, on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgpt.errors import ModelError


def installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF file opened in llama.cpp.

    Args:
        file: the GGUF file.
        context: tokens of the longest window.
        threads: of the processor; what llama.cpp chooses if not given.

    Attributes:
        llama: the binding's own object.
        engine: the binding's name and version.

    Raises:
        ModelError: llama.cpp does not read it.
    """

    def __init__(self, file: Path, context: int, threads: int | None = None):
        llama_cpp = importlib.import_module("llama_cpp")
        try:
            self.llama: Any = llama_cpp.Llama(
                str(file),
                n_ctx=context,
                n_batch=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                logits_all=True,
                verbose=False,
            )
        except ValueError as error:
            raise ModelError(f"llama.cpp does not read {file}: {error}") from error
        self.close = weakref.finalize(self, self.llama.close)  # before modules that it needs are gone
        self.context = context
        self.engine = f"llama-cpp-python {version('llama-cpp-python')}"

    @property
    def metadata(self) -> dict[str, str]:
        """The file's keys and values."""
        return self.llama.metadata

    def logits(self, ids: list[int]) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of a window that knows nothing of those before it, in float32."""
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())
