"""GGUF files in llama.cpp itself, as models that perplexity and divergence can be taken of.

transformers reads the types of some architectures and computes with what they are de-quantised to; llama.cpp reads all
of its own, with widths that differ by layer, and computes as it does for users, in the file's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import ModelError, UsageError
from slimgpt.models.llama_cpp import LlamaCpp, installed
from slimgpt.runtime.thresholds import thresholds

ENGINES = ("auto", "transformers", "llama.cpp")
"""What runs a model. ``auto`` is llama.cpp for a GGUF file where llama-cpp-python is installed, else transformers."""


def choose_engine(name: str, engine: str, needs_transformers: Sequence[str] = ()) -> str:
    """``transformers`` or ``llama.cpp`` for a model.

    Args:
        name: the model, as the user gave it.
        engine: one of :data:`ENGINES`.
        needs_transformers: what is asked for that llama.cpp does not do here, such as ``--tasks``.

    Raises:
        UsageError: an unknown engine, or llama.cpp for what it does not run here.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine '{engine}' is unknown; choose {', '.join(ENGINES)}")
    gguf = Path(name).suffix == ".gguf"
    if engine != "llama.cpp":
        return "llama.cpp" if engine == "auto" and gguf and installed() and not needs_transformers else "transformers"
    if not gguf:
        raise UsageError(
            f"llama.cpp runs .gguf files, and {name} is none; make one with `slimgpt export SLIM OUT.gguf --to gguf`"
        )
    if needs_transformers:
        raise UsageError(
            f"{', '.join(needs_transformers)}: not with llama.cpp, which takes texts on the CPU in the file's own "
            "numbers; leave that out, or take --engine transformers"
        )
    if not installed():
        raise UsageError("llama.cpp needs its Python binding: pip install llama-cpp-python")
    return engine


def engines_of(
    model: str,
    against: str | None,
    engine: str,
    work: Mapping[str, str | None],
    placement: Mapping[str, str],
) -> dict[str, str]:
    """The engine of a model and of the one that it is held against, by their names.

    ``engine`` is the model's; the base follows it to transformers, and is else run as ``auto`` says.

    Args:
        work: options that only transformers answers, with their values.
        placement: type and device by option; ``auto`` or ``cpu`` where llama.cpp may choose.

    Raises:
        UsageError: see :func:`choose_engine`.
    """
    beyond = [option for option, value in work.items() if value is not None]
    placed = [option for option, value in placement.items() if value not in ("auto", "cpu")]
    if against is None or against == model:
        return {model: choose_engine(model, engine, [*beyond, *placed])}
    base = choose_engine(against, "transformers" if engine == "transformers" else "auto", [*beyond, *placed])
    if engine == "llama.cpp" and base == "transformers":
        placed = []  # they are the base's
    return {against: base, model: choose_engine(model, engine, [*beyond, *placed])}


def load_gguf(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file in llama.cpp on the CPU, and its own tokenizer, for :func:`slimgpt.evaluate` alone.

    Raises:
        ModelError: there is no such file, or llama.cpp does not read it.
        UsageError: llama-cpp-python is not installed, or the name is not that of a ``.gguf`` file.
    """
    choose_engine(str(name), "llama.cpp")
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
        self.opened = self._open(thresholds().first_context)
        self.engine = self.opened.engine
        metadata = self.opened.metadata
        self.device, self.dtype = torch.device("cpu"), _stored_type(metadata)
        architecture = str(metadata.get("general.architecture", ""))
        longest = metadata.get(f"{architecture}.context_length")
        fields = {
            "model_type": architecture,
            "name_or_path": file.name,
            "vocab_size": self.llama.n_vocab(),
            "max_position_embeddings": None if longest is None else int(longest),
        }
        self.config = PreTrainedConfig()
        for name, value in fields.items():
            setattr(self.config, name, value)

    @property
    def llama(self) -> Any:
        """The binding's own object."""
        return self.opened.llama

    def _open(self, context: int) -> LlamaCpp:
        return LlamaCpp(self.file, context, torch.get_num_threads())

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits ``(batch, window, vocabulary)`` of windows that know nothing of each other, in float32."""
        assert not use_cache
        if input_ids.shape[1] > self.opened.context:
            self.opened.close()
            self.opened = self._open(input_ids.shape[1])
        return SimpleNamespace(logits=torch.stack([self.opened.logits(ids) for ids in input_ids.tolist()]))


class _LlamaCppTokenizer:
    """The tokenizer in a GGUF file, with what a perplexity needs of one."""

    def __init__(self, model: _LlamaCppModel):
        self.model = model
        token = int(model.llama.token_bos())
        self.bos_token_id = token if token >= 0 else None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        del verbose  # llama.cpp says nothing
        return {"input_ids": self.model.llama.tokenize(text.encode(), add_bos=add_special_tokens, special=True)}

    def __len__(self) -> int:
        return int(self.model.llama.n_vocab())


def _stored_type(metadata: dict[str, str]) -> str:
    """The type that most tensors of a file have, in llama.cpp's words, such as ``F16`` or ``Q4_K_M``."""
    from gguf import LlamaFileType  # plans need none of it

    with suppress(KeyError, ValueError):
        return LlamaFileType(int(metadata["general.file_type"])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return "as in the GGUF file"
