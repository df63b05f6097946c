"""Parts of a GGUF file that transformers' reader leaves out: settings of positions, biases, other files, tensors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as gguf_utils
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimgpt.errors import ModelError, one_line
from slimgpt.models.lookup import head_dim, text_config

INSTEAD = "give the folder of the model that the file was made from"

OURS = ("deci", "openelm")
"""Architectures that layers of different widths are exported to; transformers reads neither."""

PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
"""Keys of ``rope.scaling`` that change nothing at these values, and that no config of transformers has."""

KNOWN = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow", *NEUTRAL}

READ_ONE_BY_ONE = (
    gguf_utils.TensorProcessor,
    gguf_utils.LlamaTensorProcessor,
    gguf_utils.Gemma2TensorProcessor,
    gguf_utils.NemotronTensorProcessor,
)
"""Classes of transformers that keep the names of the tensors they change."""

ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor that rotary frequencies are divided by."""

TOLERANCE = 1e-5
"""Relative, of a rotary frequency: what float32 leaves of two ways to the same number."""


@dataclass(frozen=True)
class Header:
    """The part of a GGUF file's header that decides how it is read.

    Args:
        architecture: llama.cpp's name of it.
        rope: the keys under ``{architecture}.rope.``.
        parts: files that the model is split into.
        tensors: names of all tensors.
        factors: ``rope_freqs.weight``, by what each rotary frequency is divided ``(head_dim / 2,)``, if it is there.
    """

    architecture: str
    rope: dict[str, Any]
    parts: int
    tensors: frozenset[str]
    factors: Tensor | None


def check_file(file: Path) -> None:
    """Refuse a GGUF file that cannot be read alone.

    Raises:
        ModelError: it is damaged, a part of several, or of an architecture that only llama.cpp computes.
    """
    header = _header(file)
    named = PART.search(file.name)
    parts = max(header.parts, int(named[1]) if named else 1)
    if parts > 1:
        raise ModelError(
            f"{file} is one of {parts} parts (split.count); a GGUF file is read whole: join them with "
            "`llama-gguf-split --merge FIRST OUT`"
        )
    if header.architecture in OURS:
        raise ModelError(
            f"{file} is of architecture '{header.architecture}', whose layers differ in width; only llama.cpp computes "
            "it: give the folder that was exported"
        )


def restore_positions(file: Path, config: PreTrainedConfig) -> None:
    """Give a config the scaled positions of the GGUF file it was read from.

    Raises:
        ModelError: no config of transformers computes the same positions.
    """
    header, text = _header(file), text_config(config)
    _check_turned(file, header, text)
    scaling = _from_keys(file, header, text)
    if header.factors is not None and not _proportional(text):
        by_factors = _from_factors(file, header.factors, text)
        if by_factors and scaling:
            _refuse(file, header, "scaling.type", "stands beside rope_freqs.weight; one of them is computed, not both")
        scaling = by_factors or scaling
    if not scaling:
        return
    rope = dict(text.rope_parameters or {})
    if not _nested(rope):
        keep = rope if rope.get("rope_type") == scaling["rope_type"] else {"rope_theta": rope["rope_theta"]}
        if "partial_rotary_factor" in rope:
            keep["partial_rotary_factor"] = rope["partial_rotary_factor"]
        text.rope_parameters = {**keep, **scaling}
    elif scaling["rope_type"] == "linear" and text.model_type.startswith("gemma3"):  # of its global layers only
        rope["full_attention"] = {"rope_theta": rope["full_attention"]["rope_theta"], **scaling}
        text.rope_parameters = rope
    else:
        _refuse(file, header, "scaling.type", f"does not say which kinds of layers of '{text.model_type}' it holds for")


def restore_biases(file: Path, config: PreTrainedConfig) -> None:
    """Give a config the biases of the GGUF file it was read from, which no key of the file names."""
    tensors, text = _header(file).tensors, text_config(config)
    for setting, stem in (("attention_bias", "blk.0.attn_q"), ("mlp_bias", "blk.0.ffn_up")):
        if getattr(text, setting, None) is False and f"{stem}.bias" in tensors:
            setattr(text, setting, True)


def unread_tensors(file: Path, model: PreTrainedModel) -> list[str]:
    """Names of tensors in a GGUF file that transformers' reader drops, because the config's model has none for them.

    Only for architectures whose tensors are read one by one: others are joined and renamed on the way (experts, GPT-2).
    """
    processor = gguf_utils.TENSOR_PROCESSORS.get(_header(file).architecture, gguf_utils.TensorProcessor)
    if processor not in READ_ONE_BY_ONE:
        return []
    tensors = {name for name in _header(file).tensors if not name.startswith("rope_f")}  # see above
    for each in (_NoChildren(model), model):  # the names of all submodules take seconds, and few models need them
        tensors -= set(gguf_utils.get_gguf_hf_weights_map(each, processor(config={})))
        if not tensors:
            break
    return sorted(tensors)


class _NoChildren:
    """A model whose submodules are not seen; :func:`unread_tensors` says why."""

    def __init__(self, model: PreTrainedModel):
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> tuple[()]:
        """None."""
        return ()


def _header(file: Path) -> Header:
    try:
        state = file.stat()
        return _read_header(file, state.st_size, state.st_mtime_ns)
    except Exception as error:  # NumPy, mmap and gguf-py each fail in their own way on a damaged file
        raise ModelError(
            f"{file} cannot be read as GGUF: {one_line(error)}; is the file whole? Fetch it again"
        ) from error


@lru_cache(maxsize=8)
def _read_header(file: Path, size: int, changed: int) -> Header:  # noqa: ARG001
    values, names = read_gguf_metadata(str(file))
    architecture = str(values["general.architecture"])
    start = f"{architecture}.rope."
    rope = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    factors = _checked_tensors(file, size, ROPE_FACTORS)
    return Header(architecture, rope, int(values.get("split.count", 1)), frozenset(names), factors)


def _checked_tensors(file: Path, size: int, name: str) -> Tensor | None:
    """A tensor in fp64 if the file has it, once all tensors are known to lie within the file.

    Raises:
        ValueError: one does not.
    """
    try:
        header = GgufHeader.from_file(str(file))
    except ValueError:  # a type of numbers that transformers cannot place, and gguf-py perhaps can
        return _by_gguf_py(file, name)
    for tensor in header.tensors:
        end = header.data_start + tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(f"'{tensor.name}' ends at byte {end:,}, the file at {size:,}")
    if name not in header.ggml_types:
        return None
    values = load_gguf_state_dict(header)[name][...]
    return _by_gguf_py(file, name) if values.dtype == torch.uint8 else values.double()


def _by_gguf_py(file: Path, name: str) -> Tensor | None:
    """The same by gguf-py, which knows all types and takes seconds to read a vocabulary."""
    from gguf import GGUFReader, dequantize

    for tensor in GGUFReader(file).tensors:
        if tensor.name == name:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).double()
    return None


def _refuse(file: Path, header: Header, key: str, rule: str) -> None:
    value = header.rope.get(key)
    raise ModelError(f"{file}: {header.architecture}.rope.{key} = {value!r} {rule}; {INSTEAD}")


def _nested(rope: dict[str, Any]) -> bool:
    """Whether kinds of layers have positions of their own."""
    return any(isinstance(value, dict) for value in rope.values())


def _proportional(text: PreTrainedConfig) -> bool:
    """Whether the config computes ``rope_freqs.weight`` itself, as Gemma 4's does."""
    rope = dict(text.rope_parameters or {})
    return any(isinstance(kind, dict) and kind.get("rope_type") == "proportional" for kind in rope.values())


def _check_turned(file: Path, header: Header, text: PreTrainedConfig) -> None:
    """Refuse a file whose heads turn in another number of dimensions than the config's."""
    rope = getattr(text, "rope_parameters", None)
    turned = header.rope.get("dimension_count")
    if turned is None or not rope or _nested(rope) or hasattr(text, "qk_rope_head_dim"):
        return
    expected = int(head_dim(text) * rope.get("partial_rotary_factor", 1.0))
    if turned != expected:
        _refuse(file, header, "dimension_count", f"is not the {expected} that transformers would turn")


def _from_keys(file: Path, header: Header, text: PreTrainedConfig) -> dict[str, Any]:
    """The scaling that the keys give, as ``rope_parameters`` has it; empty without one."""
    keys = {key.removeprefix("scaling."): value for key, value in header.rope.items() if key.startswith("scaling.")}
    factor = float(keys.get("factor") or header.rope.get("scale_linear") or 1.0)
    kind = keys.get("type", "linear")  # what llama.cpp takes where only a factor is given
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in header.tensors:
            raise ModelError(
                f"{file}: {name} scales by the length of the text (longrope), which is not read; {INSTEAD}"
            )
    for key, value in keys.items():
        if key not in KNOWN or (key in NEUTRAL and value != NEUTRAL[key]):
            _refuse(file, header, f"scaling.{key}", "has no counterpart in a config of transformers")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        _refuse(file, header, "scaling.type", "is read only as none, linear or yarn")
    if not math.isfinite(factor) or factor <= 0:
        _refuse(file, header, "scaling.factor", "must be a number above 0")
    if not getattr(text, "rope_parameters", None):
        _refuse(file, header, "scaling.type", f"scales rotary positions, and '{text.model_type}' has none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = int(keys.get("original_context_length") or text.max_position_embeddings)
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    betas = {name: float(keys[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in keys}
    return {**scaling, **betas}


def _from_factors(file: Path, factors: Tensor, text: PreTrainedConfig) -> dict[str, Any]:
    """The scaling that gives rotary frequencies divided by these factors; empty where they are all 1."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    if not rope or _nested(rope):
        raise ModelError(f"{file}: rope_freqs.weight does not fit the positions of '{text.model_type}'; {INSTEAD}")
    expected = int(head_dim(text) * rope.get("partial_rotary_factor", 1.0)) // 2
    if factors.shape != (expected,) or not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise ModelError(
            f"{file}: rope_freqs.weight of shape {tuple(factors.shape)} must be {expected} numbers above 0; {INSTEAD}"
        )
    if torch.allclose(factors, torch.ones_like(factors), TOLERANCE, 0):
        return {}
    if torch.allclose(factors, factors[0].expand_as(factors), TOLERANCE, 0):
        return {"rope_type": "linear", "factor": _near_whole(float(factors[0]))}
    frequencies = rope["rope_theta"] ** (-torch.arange(expected, dtype=torch.float64) / expected)
    for factor, low, high, original in _llama3_candidates(factors, 2 * math.pi / frequencies):
        if not 0 < low < high or original < 1:
            continue
        tried = copy.deepcopy(text)
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        tried.rope_parameters = {**rope, **scaling}
        computed, _ = ROPE_INIT_FUNCTIONS["llama3"](tried, "cpu")
        if torch.allclose(computed.double(), frequencies / factors, TOLERANCE, 0):
            return scaling
    raise ModelError(
        f"{file}: rope_freqs.weight divides the rotary frequencies by {float(factors.min()):g} to "
        f"{float(factors.max()):g}, and not as llama3's scaling does, the only one that is read; {INSTEAD}"
    )


def _llama3_candidates(factors: Tensor, waves: Tensor) -> Iterator[tuple[float, float, float, int]]:
    """Factor, low and high frequency factor and original length that may give these factors at these wavelengths.

    A frequency of wavelength ``w`` is multiplied by ``s + (1 - s) / factor`` with ``s = (original / w - low) /
    (high - low)`` within 0 and 1. Only two of the three numbers in ``s`` can be told from it; ``low`` is 1 in all
    models of Meta's.
    """
    most = _near_whole(float(factors.max()))
    for factor in (most, *(other for other in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0) if other > most)):
        share = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
        x, s = 1 / waves[between], share[between]
        for wave, part in zip(waves[between].tolist(), s.tolist()):
            yield factor, 1.0, 4.0, round(wave * (3 * part + 1))
        if len(x) > 1:
            slope = float(((x - x.mean()) * (s - s.mean())).sum() / ((x - x.mean()) ** 2).sum())
            offset = slope * float(x.mean()) - float(s.mean())
            for low in (1.0, 2.0, 0.5, 1.5, 3.0, 4.0) if offset > 0 else ():
                yield factor, low, _near_whole(low * (1 + 1 / offset)), round(low * slope / offset)
        if len(x) == 1:  # many pairs of a length and a factor go through one point
            wave, part = 1 / float(x[0]), float(s[0])
            longer = waves[waves > wave * (1 + TOLERANCE)]
            last = float(longer.min()) if len(longer) else 4 * wave
            for step in range(8):
                original = math.ceil(wave + step * (last - wave) / 8)
                yield factor, 1.0, 1 + (original / wave - 1) / part, original
        if len(x) == 0:  # the step lies between two wavelengths; wherever it is, the frequencies are the same
            plain, scaled = waves[factors <= 1 + TOLERANCE], waves[factors > 1 + TOLERANCE]
            before = float(plain.max()) if len(plain) else float(scaled.min()) / 8
            original = math.ceil(float(scaled.min())) - 1
            for power in range(1, 24):
                if 4 * before < 2**power < float(scaled.min()):
                    yield factor, 1.0, 4.0, 2**power
            yield factor, 1.0, (1 + original / before) / 2, original


def _near_whole(number: float) -> float:
    """The nearest whole number where only float32 lies between, else the number."""
    return float(round(number)) if abs(number - round(number)) < 1e-3 * abs(number) else number
