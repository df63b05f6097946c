"""The place of a model: a hub id, a folder, a GGUF file, an adapter or the demo."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download

from slimgpt import assets
from slimgpt.errors import ModelError, one_line
from slimgpt.io import weight_files
from slimgpt.models.adapters import CONFIG_FILE, WEIGHTS_FILE, base_of, is_adapter
from slimgpt.models.quantization import Quantization, location_quantization

WEIGHTS = ("*.json", "model*.safetensors")
BESIDE = ("*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md")
"""Files of a hub repository beside the weights: the tokenizer's, templates, code (which runs only where it is allowed)
and terms of use."""


@dataclass(frozen=True)
class Source:
    """The place of a model: the argument of ``from_pretrained``, the name of a GGUF file inside it if it is one, and
    the folder of an adapter to be merged into it."""

    name: str
    location: str
    gguf_file: str | None = None
    adapter: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or ``None`` for a hub id."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def folders(self) -> list[Path]:
        """All local folders that are read: of the weights, and of the adapter."""
        return [folder for folder in (self.folder, self.adapter) if folder is not None]

    @property
    def arguments(self) -> dict[str, str]:
        """The keyword arguments that every ``from_pretrained`` call needs."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @cached_property
    def quantization(self) -> Quantization | None:
        """Quantisation of the weights; ``None`` if they have none, and for a GGUF file.

        Raises:
            ModelError: in a way that cannot be read; or one of the JSON files is damaged.
        """
        return None if self.gguf_file else location_quantization(self.name, self.location)


def locate(name: str) -> Source:
    """Find what the user means by MODEL.

    Raises:
        ModelError: it looks like a path and nothing is there, or the folder holds no model, or a pipe or a dead link in
            the place of one of its files.
    """
    if name == assets.DEMO:
        file = assets.demo_model()
        return Source(assets.MODEL_NAME, str(file.parent), file.name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {path}")
        return Source(path.name, str(path.parent), path.name)
    if path.is_dir():
        weight_files.check_regular(path / name for name in weight_files.READ_IF_THERE)
        if is_adapter(path):
            base = base_of(path)
            if Path(base).expanduser().is_dir() and is_adapter(Path(base).expanduser()):
                raise ModelError(
                    f"{path / CONFIG_FILE} names {base} as base_model_name_or_path, which is an adapter itself; merge "
                    "that into its model first, and name the merged model"
                )
            return replace(locate(base), name=path.name, adapter=path)
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; give the folder that save_pretrained wrote")
        left_over = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (path / name).is_file()]
        if left_over:
            warnings.warn(
                f"{path} holds a whole model, and {' and '.join(left_over)} beside it; the model is read without the "
                "adapter. If it is to be merged, move it to a folder of its own",
                stacklevel=2,
            )
        return Source(path.name, str(path))
    if path.is_file():
        raise ModelError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"no such folder: {path}")
    return Source(name, name)


def weights_folder(source: Source) -> Path | None:
    """The folder of a model's safetensors files, fetched from the hub if need be; ``None`` for a GGUF file.

    An adapter's is that of its base model.

    Raises:
        ModelError: the hub cannot be reached, or has no safetensors files of it.
    """
    if source.gguf_file:
        return None
    if source.folder is not None:
        return source.folder
    try:
        return Path(snapshot_download(source.location, allow_patterns=[*WEIGHTS, *BESIDE]))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot fetch the weights of '{source.name}': {one_line(error)}") from error


def fetched(source: Source) -> Source:
    """The source with its files on this machine, so that all that is read of it is read from one folder.

    Raises:
        ModelError: the hub cannot be reached, or has no safetensors files of it.
    """
    if source.gguf_file or source.folder is not None:
        return source
    return replace(source, location=str(weights_folder(source)))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors files of a model, or an index of them."""
    return any(os.path.lexists(folder / name) for name in (weight_files.SINGLE_FILE, weight_files.INDEX_FILE))


def check_files(source: Source) -> None:
    """Open the header of every safetensors file of a local model before anything long begins.

    Raises:
        ModelError: there is no safetensors file, one cannot be read, a tensor is in two of them, or one is of 8 bits
            and no config tells its scales.
    """
    if source.folder is not None and not source.gguf_file:
        weight_files.check_files(weight_files.weight_files(source.folder), narrow=source.quantization is not None)
