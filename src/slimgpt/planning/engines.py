"""Support of given widths by inference engines, and what to change where one lacks it. From the config alone.

The facts behind it are those of the engines' own sources; what `slimgpt export` and the tests run here agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes, is_uniform
from slimgpt.models.lookup import head_dim, lookup, text_config
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.engine_classes import MLX_CLASSES, MLX_VERSION
from slimgpt.planning.engine_releases import releases_of
from slimgpt.planning.stock_forms import padded_problem, stock_forms
from slimgpt.runtime.setting_checks import AUTO

NEMOTRON_STEP = 256
"""FFN widths that ``block_configs`` can express are multiples of it."""

VLLM_NATIVE = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "granite", "phi3", "smollm3")
"""Families whose own vLLM class reads ``head_dim`` from the config; qwen2's does not."""


@dataclass(frozen=True)
class EngineSupport:
    """Support of a model by one engine.

    Args:
        engine: its name, a key of :data:`ENGINES`.
        runs: whether it runs the model as it would be saved or exported.
        how: the form it takes, or why it takes none.
        change: what to ask for instead, where it does not run it or runs it slower than it could.
        releases: which transformers its releases need, a line each.
    """

    engine: str
    runs: bool
    how: str
    change: str = ""
    releases: tuple[str, ...] = ()


def engine_support(
    config: PreTrainedConfig, layers: Sequence[Sizes], engines: Sequence[str] | None = None
) -> list[EngineSupport]:
    """One verdict per engine.

    Args:
        config: the model's config, dense or slim.
        layers: the widths that its layers will have.
        engines: keys of :data:`ENGINES`; all of them if not given.

    Raises:
        PlanError: an unknown engine.
    """
    names = list(ENGINES) if engines is None else list(engines)
    for name in names:
        if name not in ENGINES:
            raise PlanError(f"engine '{name}' is unknown; choose {', '.join(ENGINES)}")
    by_layer = not is_uniform(layers)
    return [replace(ENGINES[name](config, layers), releases=releases_of(name, by_layer)) for name in names]


def gguf_architecture(config: PreTrainedConfig, layers: Sequence[Sizes]) -> str:
    """The architecture of llama.cpp that computes the model at these widths: ``llama``, ``deci``, ``qwen3`` or
    ``openelm``.

    ``deci`` builds every layer from arrays of widths: RMSNorm, SwiGLU, optional biases, no attention where there are 0
    heads. ``openelm`` does too and has norms on queries and keys, but no output matrix of its own, no biases, no scaled
    positions, and attention in every layer.

    Raises:
        PlanError: there is none; the text says why, and which form can be used instead.
    """
    family, uniform = config.model_type, is_uniform(layers)
    if uniform:
        form = "--to hf-uniform" if stock_config(config, layers[0]) is not None else ""
    else:
        form = stock_forms(config, layers, "prune --uniform", "--to padded")
    instead = f"; use {form} and llama.cpp's own converter" if form else ""
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise PlanError(f"model_type '{family}' is none that our GGUF writer knows{instead}")
    window = getattr(config, "sliding_window", None)
    sliding = any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ())
    if window and (sliding or family == "mistral") and window < config.max_position_embeddings:
        raise PlanError(f"its sliding window of {window} tokens has no place in llama.cpp's {family}{instead}")
    if config.hidden_act != "silu":
        raise PlanError(f"its activation '{config.hidden_act}' has no place in llama.cpp's deci{instead}")
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "llama3", "yarn"):
        raise PlanError(f"its positions (rope_type '{kind}') cannot be written{instead}")
    if family != "qwen3":
        return "llama" if uniform and family != "qwen2" else "deci"
    if getattr(config, "attention_bias", False):
        raise PlanError(f"qwen3 with biases has no place in llama.cpp{instead}")
    if uniform:
        return "qwen3"
    if not all(layer[HEADS] for layer in layers):
        raise PlanError("openelm has attention in every layer; use --to padded")
    if not config.tie_word_embeddings:
        raise PlanError(
            "layers of different widths with norms on queries and keys run as openelm, which has no output matrix of "
            "its own, and this model has one; prune with --uniform, or use --to padded"
        )
    if kind != "default":
        raise PlanError(
            f"openelm has no scaled positions (rope_type '{kind}'); prune with --uniform, or use --to padded"
        )
    return "openelm"


def nemotron_problem(config: PreTrainedConfig, layers: Sequence[Sizes]) -> str | None:
    """Why ``block_configs`` cannot hold the model; ``None`` if it can."""
    if config.model_type != "llama":
        return f"nemotron-nas is a Llama; this is '{config.model_type}'"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "nemotron-nas has no biases"
    heads = {(layer[HEADS], layer[KV_HEADS]) for layer in layers if layer[HEADS]}
    if len(heads) > 1 or next(iter(heads))[0] * head_dim(config) != config.hidden_size:
        return "nemotron-nas needs all heads of the dense model in every layer with attention; prune the FFN alone"
    odd = [layer[CHANNELS] for layer in layers if layer[CHANNELS] % NEMOTRON_STEP]
    if odd:
        return (
            f"FFN widths must be multiples of {NEMOTRON_STEP} ({odd[0]} is not); prune with --round-to {NEMOTRON_STEP}"
        )
    return None


def graph_problem(config: PreTrainedConfig) -> str | None:
    """Why a model cannot become a graph with one causal mask and a cache of keys and values; ``None`` if it can."""
    text = text_config(config)
    if text is not config:
        return f"'{config.model_type}' also takes images, and only the language model would become a graph"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"it has layers of '{min(kinds)}', and the graph has one mask for all"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and window < text.max_position_embeddings:
        return f"its sliding window of {window} tokens has no place in the graph's mask"
    return None


def _hf(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:
    if not is_uniform(layers):
        how = "from_pretrained with trust_remote_code=True: a small modeling file travels in the folder"
        ways = stock_forms(config, layers, "--uniform", "export --to padded")
        return EngineSupport("hf", True, how, ways and f"a stock class: {ways}")
    stock = stock_config(config, layers[0])
    if stock is None:
        how = "from_pretrained with trust_remote_code=True: no stock class takes this head count"
        return EngineSupport("hf", True, how, "a head count that divides hidden_size")
    relabelled = "" if stock.model_type == config.model_type else f", relabelled as {stock.model_type}"
    return EngineSupport("hf", True, f"stock class, no flag{relabelled}")


def _vllm(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:
    if is_uniform(layers):
        stock = stock_config(config, layers[0])
        width = layers[0][CHANNELS]
        change = "" if width % 64 == 0 else f"full speed: --round-to 64 (the FFN has {width} channels)"
        ordinary = layers[0][HEADS] * head_dim(config) == text_config(config).hidden_size or _linked(config)
        if stock is not None and (stock.model_type in VLLM_NATIVE or ordinary):
            return EngineSupport("vllm", True, "its own class", change)
        return EngineSupport("vllm", True, "Transformers backend (--model-impl transformers)", change)
    if nemotron_problem(config, layers) is None:
        return EngineSupport("vllm", True, "its own class: export --to nemotron-nas")
    if not all(layer[HEADS] for layer in layers):  # vLLM 0.32 says so when it builds the model
        how = "its Transformers backend wants attention in every layer"
        padded = "" if padded_problem(config, layers) else "export --to padded, or "
        return EngineSupport("vllm", False, how, f"{padded}prune without --drop-attention")
    ways = stock_forms(config, layers, "--uniform --round-to 64", "export --to padded")
    if _linked(config):
        how = "its Transformers backend has not been run with layers that read more than the hidden states"
        return EngineSupport("vllm", False, how, ways and f"its own class: {ways}")
    how = "Transformers backend: --model-impl transformers --trust-remote-code"
    return EngineSupport("vllm", True, how, ways and f"its own class: {ways}")


def _linked(config: PreTrainedConfig) -> bool:
    """Whether layers read embeddings of the tokens, or keys and values of other layers."""
    architecture = lookup(config)
    return architecture is not None and (bool(architecture.by_batch) or architecture.shares is not None)


def _llama_cpp(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:
    try:
        arch = gguf_architecture(config, layers)
    except PlanError as error:
        return EngineSupport("llama.cpp", False, str(error).split(";")[0], str(error).partition(";")[2].strip())
    odd = any(layer[CHANNELS] % 256 for layer in layers)
    change = "smaller K-quants: --round-to 256 (other rows fall back to larger types)" if odd else ""
    return EngineSupport("llama.cpp", True, f"export --to gguf (architecture {arch})", change)


def _stock_or_nemotron(engine: str) -> Callable[[PreTrainedConfig, Sequence[Sizes]], EngineSupport]:
    def verdict(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:
        if is_uniform(layers) and stock_config(config, layers[0]) is not None:
            return EngineSupport(engine, True, "the folder as it is (stock class)")
        if nemotron_problem(config, layers) is None:
            return EngineSupport(engine, True, "export --to nemotron-nas")
        ways = stock_forms(config, layers, "--uniform", "export --to padded")
        return EngineSupport(engine, False, "its layers must have equal widths", ways)

    return verdict


def _mlx(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:
    if config.model_type not in MLX_CLASSES:
        return EngineSupport("mlx", False, f"mlx-lm {MLX_VERSION} has no class for '{config.model_type}'")
    return _stock_or_nemotron("mlx")(config, layers)


def _onnx(config: PreTrainedConfig, layers: Sequence[Sizes]) -> EngineSupport:  # noqa: ARG001
    if (problem := graph_problem(config)) is not None:
        return EngineSupport("onnx", False, problem)
    return EngineSupport("onnx", True, "export --to onnx or openvino")


ENGINES: dict[str, Callable[[PreTrainedConfig, Sequence[Sizes]], EngineSupport]] = {
    "hf": _hf,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "sglang": _stock_or_nemotron("sglang"),
    "mlx": _mlx,
    "onnx": _onnx,
}
"""By the names that ``--for`` takes."""


@dataclass(frozen=True)
class EngineConstraints:
    """Constraints that ``--for`` puts on a plan: a step of FFN widths, and equal layers or not."""

    round_to: int
    uniform: bool


PROFILES: dict[str, EngineConstraints] = {
    "hf": EngineConstraints(1, False),
    "vllm": EngineConstraints(64, True),
    "llama.cpp": EngineConstraints(32, False),
    "sglang": EngineConstraints(64, True),
    "mlx": EngineConstraints(32, True),
    "onnx": EngineConstraints(1, True),
}
"""Rows of a multiple of 32 numbers can be quantised to Q8_0, and those of 64 run at full speed on tensor cores."""


def constraints_for(engines: Sequence[str]) -> EngineConstraints:
    """The profile that suits all of these engines.

    Raises:
        PlanError: an unknown engine.
    """
    for name in engines:
        if name not in PROFILES:
            raise PlanError(f"engine '{name}' is unknown; choose {', '.join(PROFILES)}")
    chosen = [PROFILES[name] for name in engines] or [PROFILES["hf"]]
    return EngineConstraints(max(profile.round_to for profile in chosen), any(profile.uniform for profile in chosen))


def suit_engines(names: Sequence[str], settings: dict[str, Any]) -> None:
    """Give settings the step of FFN widths and the equal layers that engines ask for, where nothing is said.

    Args:
        settings: keywords of a pruning; changed in place.

    Raises:
        PlanError: an engine is unknown.
    """
    constraints = constraints_for(names)
    settings["uniform"] = settings.get("uniform") or constraints.uniform
    if settings.get("round_to") is None:
        # Equal layers of our own method have the engine's step by default, or a part of it where that meets the target.
        own = settings.get("method", "slimgpt") == "slimgpt"
        auto = (constraints.uniform and own) or constraints.round_to == 1
        settings["round_to"] = AUTO if auto else constraints.round_to
