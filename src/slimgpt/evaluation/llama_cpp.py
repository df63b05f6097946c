"""GGUF files in llama.cpp itself, as models that perplexity and divergence can be taken of.

transformers reads the types of some architectures and computes with what they are de-quantised to; llama.cpp reads all
of its own, with widths that differ by layer, and computes as it does for users, in the file's own numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import ModelError, UsageError

ENGINES = ("auto", "transformers", "llama.cpp")
"""What runs a model. ``auto`` is llama.cpp for a GGUF file where llama-cpp-python is installed, else transformers."""


def choose_engine(name: str, engine: str, only_text: bool) -> str:
    """``transformers`` or ``llama.cpp`` for a model.

    Args:
        name: the model, as the user gave it.
        engine: one of :data:`ENGINES`.
        only_text: whether nothing but a text is asked for: tasks and pass keys run in transformers.

    Raises:
        UsageError: an unknown engine, or llama.cpp for what it does not run here.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine '{engine}' is unknown; choose {', '.join(ENGINES)}")
    gguf, installed = Path(name).suffix == ".gguf", importlib.util.find_spec("llama_cpp") is not None
    if engine != "llama.cpp":
        return "llama.cpp" if engine == "auto" and gguf and installed and only_text else "transformers"
    if not gguf:
        raise UsageError(f"llama.cpp runs GGUF files, and {name} is none; `slimgpt export SLIM OUT.gguf --to gguf`")
    if not installed:
        raise UsageError("llama.cpp needs its Python binding: pip install llama-cpp-python")
    if not only_text:
        raise UsageError(
            "tasks and pass keys are not asked in llama.cpp: leave them out, or take --engine transformers"
        )
    return engine


def load_gguf(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file in llama.cpp on the CPU, and its own tokenizer, for :func:`slimgpt.evaluate` alone.

    Raises:
        ModelError: there is no such file, or llama.cpp does not read it.
        UsageError: llama-cpp-python is not installed.
    """
    choose_engine(str(name), "llama.cpp", only_text=True)
    file = Path(name).expanduser()
    if not file.is_file():
        raise ModelError(f"no such GGUF file: {file}")
    model = _LlamaCppModel(file)
    return cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, _LlamaCppTokenizer(model))


class _LlamaCppModel(nn.Module):
    """Logits of a GGUF file, window by window; the context is made as long as the longest window."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.llama = self._open(512)
        self.length = 512
        self.engine = f"llama-cpp-python {version('llama-cpp-python')}"
        self.device, self.dtype = torch.device("cpu"), "as in the GGUF file"
        config: Any = PreTrainedConfig()
        config.vocab_size = self.llama.n_vocab()
        config.max_position_embeddings = self.llama._model.n_ctx_train()
        config.name_or_path = file.name
        self.config = config

    def _open(self, length: int) -> Any:
        llama_cpp = importlib.import_module("llama_cpp")
        threads = torch.get_num_threads()
        try:
            return llama_cpp.Llama(
                str(self.file),
                n_ctx=length,
                n_batch=length,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
            )
        except ValueError as error:
            raise ModelError(f"llama.cpp does not read {self.file}: {error}") from error

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits ``(batch, window, vocabulary)`` of windows that know nothing of each other."""
        assert not use_cache
        if input_ids.shape[1] > self.length:
            self.length = input_ids.shape[1]
            self.llama = self._open(self.length)
        rows = []
        for ids in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(ids)
            rows.append(torch.from_numpy(self.llama.scores[: len(ids)].copy()))
        return SimpleNamespace(logits=torch.stack(rows))


class _LlamaCppTokenizer:
    """The tokenizer in a GGUF file, with what a perplexity needs of one."""

    def __init__(self, model: _LlamaCppModel):
        self.llama = model.llama
        token = int(self.llama.token_bos())
        self.bos_token_id = token if token >= 0 else None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        del verbose  # llama.cpp says nothing
        return {"input_ids": self.llama.tokenize(text.encode(), add_bos=add_special_tokens, special=True)}

    def __len__(self) -> int:
        return int(self.llama.n_vocab())
