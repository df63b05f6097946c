"""The language model's part of a multimodal config, against what the file says and what the class makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.errors import ModelError, one_line
from slimgpt.models.config_files import CONFIG_FILE, read_object
from slimgpt.models.families import MULTIMODAL
from slimgpt.models.source import Source
from slimgpt.models.ties import is_tied


def check_language_model(config: PreTrainedConfig, source: Source) -> None:
    """Refuse a config with a part that is named as that of a language model is, and that its class does not know."""
    try:
        part = config.get_text_config(decoder=True)
    except Exception as error:  # several parts, of which none is the only one
        raise ModelError(f"cannot read the config of '{source.name}': {one_line(error)}") from error
    if not isinstance(part, PreTrainedConfig):
        names = ("text_config", "decoder", "generator", "text_encoder")
        key = next((name for name in names if getattr(config, name, None) is part), names[0])
        raise ModelError(
            f"{key} in the config of '{source.name}' is no config of a language model: model_type "
            f"'{config.model_type}' has no such part; take {key} out, or give the right model_type"
        )


def check_layout(config: PreTrainedConfig, raw: dict[str, Any], source: Source) -> None:
    """Refuse a multimodal config of other code, whose language model would have the sizes of the class's defaults."""
    text = config.get_text_config(decoder=True) if config.model_type in MULTIMODAL else config
    if text is config or "text_config" in raw:
        return
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if isinstance(raw.get(key), int) and raw[key] != getattr(text, key, None):
            raise ModelError(
                f"the config of '{source.name}' has {key} {raw[key]} beside model_type '{config.model_type}', whose "
                "class in transformers reads it from text_config: the model was saved by other code. Give the "
                "checkpoint of the same model that transformers saved (often named -hf)"
            )


def is_tied_by_default_alone(config: PreTrainedConfig, folder: Path) -> bool:
    """Whether only the default of a multimodal class ties a model whose files say nothing of it, and whose language
    model's config does not; transformers goes by the weights then, and here are none."""
    text = config.get_text_config(decoder=True)
    said_so = "tie_word_embeddings" in read_object(folder / CONFIG_FILE)
    return text is not config and not said_so and not is_tied(text)
