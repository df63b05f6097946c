"""A Hugging Face tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from slimgpt.errors import ExportError

PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, pre: str | None = None
) -> list[str]:
    """Write vocabulary, merges, special tokens and chat template.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer does not use are filled up.
        pre: llama.cpp's name for how text is split before merging; found from the tokenizer if not given.

    Returns:
        Notes for the user.

    Raises:
        ExportError: a tokenizer that llama.cpp has no counterpart for, or more tokens than rows.
    """
    inner = _serialised(tokenizer)
    model = inner["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"a tokenizer of type {model.get('type')} cannot be written to GGUF; BPE can")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    notes = check_normalizer(inner)
    if _byte_level(inner):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_tokenizer(inner))
        writer.add_token_merges(merges)
        scores = None
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre or "default")
        scores = _scores(model["vocab"], merges)
        writer.add_add_space_prefix(_adds_space(inner))
    else:
        raise ExportError("the tokenizer is neither byte-level BPE nor BPE with byte fallback; GGUF knows these two")
    tokens, types = _vocabulary(inner, vocab_size, byte_tokens=scores is not None)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if (value := getattr(tokenizer, name, None)) is not None:
            add(int(value))
    first = tokenizer("a").input_ids[:1]
    last = tokenizer("a").input_ids[-1:]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and last == [tokenizer.eos_token_id])
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        writer.add_chat_template(templates)
    elif templates:  # tokenizer.chat_template is the default one, tokenizer.chat_template.NAME another
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    return notes


def check_normalizer(inner: dict[str, Any]) -> list[str]:
    """Notes on what a tokenizer does to text before it is split, and GGUF has no field for.

    Raises:
        ExportError: a step that changes the ids of ordinary text.
    """
    steps = _parts(inner.get("normalizer"))
    notes = []
    for step in steps:
        kind = step["type"]
        space = kind == "Prepend" or (kind == "Replace" and step["pattern"].get("String") == " ")
        if kind == "NFC":
            notes.append("GGUF has no NFC normalizer: letters given in pieces (a, then an accent) get other ids")
        elif not space or _byte_level(inner):
            raise ExportError(
                f"the tokenizer's normalizer {kind} has no place in GGUF, so ids would differ; use --to padded"
            )
    if any(p["type"] == "ByteLevel" and p.get("add_prefix_space") for p in _parts(inner.get("pre_tokenizer"))):
        raise ExportError(
            "the tokenizer has add_prefix_space, which llama.cpp does not do for byte-level BPE, so ids would differ; "
            "use --to padded"
        )
    return notes


def pre_tokenizer(inner: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text before merging.

    Raises:
        ExportError: a way of splitting that is not among the known ones.
    """
    parts = _parts(inner.get("pre_tokenizer"))
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in parts)
    own_regex = any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts)
    if not patterns and own_regex:
        return "smollm" if digits else "gpt-2"
    text = "".join(patterns)
    if not digits and r"\p{N}{1,3}" in text:
        return "llama-bpe"
    if not digits and r"\p{N}|" in text and "(?i:'s|'t" in text:
        return "qwen2"
    raise ExportError(
        "how this tokenizer splits text is not known to us by llama.cpp's names; pass --tokenizer-pre with the name "
        f"that llama.cpp uses for it, such as {', '.join(PRE_TOKENIZERS)}"
    )


def _serialised(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("only fast tokenizers (tokenizer.json) can be written to GGUF")
    return json.loads(backend.to_str())


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [part for child in node.get("pretokenizers") or node["normalizers"] for part in _parts(child)]
    return [node]


def _byte_level(inner: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(inner.get("pre_tokenizer")))


def _adds_space(inner: dict[str, Any]) -> bool:
    return any(part.get("prepend_scheme", "always") != "never" for part in _parts(inner.get("pre_tokenizer"))) or (
        "Prepend" in json.dumps(inner.get("normalizer"))
    )


def _scores(vocab: dict[str, int], merges: list[str]) -> dict[str, float]:
    """Token scores for llama.cpp's SentencePiece merging: earlier merges first."""
    scores = dict.fromkeys(vocab, 0.0)
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        token = left + right
        if scores.get(token) == 0.0:
            scores[token] = -float(rank + 1)
    return scores


def _vocabulary(inner: dict[str, Any], vocab_size: int, byte_tokens: bool) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in inner["model"]["vocab"].items()}
    added = {token["id"]: token for token in inner.get("added_tokens", ())}
    by_id |= {index: token["content"] for index, token in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise ExportError(f"the tokenizer has ids up to {max(by_id)}, the model only {vocab_size} embeddings")
    tokens, types = [], []
    unknown = inner["model"].get("unk_token")
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if token == unknown and byte_tokens:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif byte_tokens and len(token) == 6 and token.startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types
