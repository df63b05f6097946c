"""The tensors of a model folder, memory-mapped, and a model around them whose layers come one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.errors import ModelError, NumericalError
from slimgpt.io.weight_files import check_files, weight_files
from slimgpt.models.build import architecture_of, empty_model, rebuild_layer
from slimgpt.models.config_files import read_generation_config
from slimgpt.models.quantization import folder_quantization
from slimgpt.models.quantized_tensors import QuantizedTensor, quantized_tensors
from slimgpt.models.read_ahead import ReadAhead
from slimgpt.models.source import Source, weights_folder
from slimgpt.models.ties import untie, warn_untied
from slimgpt.models.unknown_tensors import refuse_unknown, unknown_tensors
from slimgpt.runtime.devices import DTYPES


class WeightFiles:
    """The tensors of a folder's safetensors files by name.

    Files are mapped, not read: a tensor's pages come from disk when it is used and do not count as memory of ours. What
    is quantised is read with its scales and de-quantised whenever it is asked for, and has the name and shape that it
    had before.

    Args:
        folder: the model folder.
        dtype: what quantised tensors become.

    Attributes:
        quantization: how the folder is quantised; ``None`` if it is not.

    Raises:
        ModelError: see :func:`slimgpt.io.weight_files.weight_files` and ``check_files`` there; or the numbers of a
            quantised folder cannot be had back.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16):
        self.folder, self.files, self._dequantized = folder, weight_files(folder), dtype
        self.quantization = folder_quantization(folder)
        check_files(self.files, narrow=self.quantization is not None)
        self._handles = [safe_open(file, framework="pt") for file in self.files]
        self._where = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        self._stored = dict(self._where)
        self._quantized: dict[str, QuantizedTensor] = {}
        if self.quantization is not None:
            kinds = {name: handle.get_slice(name).get_dtype() for name, handle in self._stored.items()}
            self._quantized, dropped = quantized_tensors(str(folder), kinds, self._stored_shape, self.quantization)
            parts = {part for tensor in self._quantized.values() for part in tensor.parts}
            plain = {name: handle for name, handle in self._stored.items() if name not in parts | dropped}
            self._where = {**plain, **{name: self._stored[t.parts[0]] for name, t in self._quantized.items()}}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._quantized.get(name)
        if tensor is None:
            return self._where[name].get_tensor(name)
        if self.quantization is not None:
            self.quantization.check_library(str(self.folder))
        parts = [self._stored[part].get_tensor(part) for part in tensor.parts]
        return tensor.decode(parts, self._dequantized)

    def mapped(self, name: str) -> bool:
        """Whether a tensor is used where it lies in its file."""
        return name in self._where and name not in self._quantized

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point tensor."""
        if self.quantization is not None:
            return self._dequantized
        tensors = (self[name] for name in self._where)
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        tensor = self._quantized.get(name)
        if tensor is None:
            return self._stored_shape(name)
        part = tensor.shape_part
        return tensor.shape(
            self._stored_shape(tensor.parts[0]) if part is None else self._stored[part].get_tensor(part)
        )

    def slices(self) -> dict[str, Any]:
        """Every tensor as ``from_pretrained`` takes them in a state dict: read when it is indexed, not before."""
        return {
            name: _Slice(self, name) if name in self._quantized else handle.get_slice(name)
            for name, handle in self._where.items()
        }

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored[name].get_slice(name).get_shape())

    def unknown(self, model: PreTrainedModel) -> list[str]:
        """The names of tensors that the model does not have and that matter, sorted."""
        expected = model.state_dict()
        return unknown_tensors(model, (name for name in self._where if name not in expected))


class _Slice:
    """A quantised tensor that is read when it is indexed."""

    def __init__(self, weights: WeightFiles, name: str):
        self.weights, self.name = weights, name

    def __getitem__(self, index: Any) -> Tensor:
        return WeightFiles.__getitem__(self.weights, self.name)[index]


class StreamedModel:
    """A model whose embeddings, norms and head are mapped from its files and whose layers are brought in one by one.

    Args:
        config: the model's config.
        weights: its files.
        dtype: convert the weights to it as they come; ``None`` leaves them as stored.

    Attributes:
        model: the model; its layers have shapes and no storage.

    Raises:
        ModelError: see :func:`weights_mismatch`, which tells beforehand; or the files hold tensors that the model
            does not have.
    """

    def __init__(self, config: PreTrainedConfig, weights: WeightFiles, dtype: torch.dtype | None = None):
        self.weights, self.dtype = weights, dtype
        self.ahead: ReadAhead | None = None
        self._last = -1  # the layer that was asked for before
        self.model = empty_model(config)
        self.prefix = architecture_of(config, self.model).layers
        self._empty_layers = list(self.model.get_submodule(self.prefix).children())
        if (problem := weights_mismatch(self.model, weights)) is not None:
            raise ModelError(f"cannot stream {weights.folder}: {problem}")
        refuse_unknown(str(weights.folder), weights.unknown(self.model))
        around = [name for name in self.model.state_dict() if not name.startswith(f"{self.prefix}.")]
        state = {name: self._read(name) for name in around if name in weights}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        fill_buffers(self.model)
        self.model.generation_config = read_generation_config(weights.folder)
        self.model.eval()
        self.model.requires_grad_(False)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights mapped from the files, or read ahead."""
        empty, names = self._empty_layers[index], self._names(index)
        ready = {} if self.ahead is None else self.ahead.take(list(names.values()))
        state = {name: ready[full] if full in ready else self._read(full) for name, full in names.items()}
        following = index - 1 if index == self._last - 1 else index + 1  # gradients are computed from the last one on
        self._last = index
        if self.ahead is not None and 0 <= following < len(self._empty_layers):
            self.ahead.start(list(self._names(following).values()))
        return rebuild_layer(empty, self.model.config, index, state)

    def read_ahead(self, device: torch.device) -> None:
        """From now on, whenever a layer is asked for, read the one behind it in a thread; backwards, the one
        in front of it.

        Args:
            device: where layers run.
        """
        self.ahead = ReadAhead(self._read, self.weights.mapped, device)

    def _names(self, index: int) -> dict[str, str]:
        """The names of a layer's tensors inside it, and in the model."""
        empty = self._empty_layers[index]
        return {name: f"{self.prefix}.{index}.{name}" for name in empty.state_dict()}

    def check_finite(self, part: int = 0, parts: int = 1) -> None:
        """Look for NaN and infinity in the stored weights, one tensor at a time.

        Args:
            part: check only every ``parts``-th tensor, from this one.

        Raises:
            NumericalError: with the name of the first tensor that has one.
        """
        names = [name for name in self.model.state_dict() if name in self.weights]
        check_finite((name, self.weights[name]) for name in names[part::parts])

    def _read(self, name: str) -> Tensor:
        tensor = self.weights[name]
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor


def weights_mismatch(model: PreTrainedModel, weights: WeightFiles) -> str | None:
    """Why the names and shapes in the files are not those of the model; ``None`` if they are.

    transformers renames or regroups the tensors of some checkpoints on the way in; those must be loaded whole.
    """
    tied = model.all_tied_weights_keys or {}
    for name, tensor in model.state_dict().items():
        if name not in weights:
            if name not in tied:
                return f"the files lack {name}"
        elif weights.shape(name) != tuple(tensor.shape):
            return f"{name} is {weights.shape(name)} in the files and {tuple(tensor.shape)} by the config"
    return None


def stored_head(model: PreTrainedModel, weights: WeightFiles) -> str | None:
    """The tensor that the model ties to another and that differs from it in the files; ``None`` if there is none.

    transformers leaves such a pair untied when it loads the files; what is equal to the bit stays tied.
    """
    for head, embedding in (model.all_tied_weights_keys or {}).items():
        if head in weights and embedding in weights and not torch.equal(weights[head], weights[embedding]):
            return head
    return None


def untie_as_stored(config: PreTrainedConfig, model: PreTrainedModel, weights: WeightFiles) -> bool:
    """Untie a config whose files hold a head of their own; whether it was done.

    Args:
        model: the model of the config, its empty form will do.
    """
    head = stored_head(model, weights)
    if head is not None:
        untie(config)
        warn_untied(str(weights.folder), head)
    return head is not None


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Look for NaN and infinity.

    Raises:
        NumericalError: with the name of the first tensor that has one.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN spreads to both; unlike isfinite this allocates nothing
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NumericalError(
                    f"the weights hold NaN or infinity in {name}; the file is damaged or training diverged"
                )


def fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no file holds (rotary frequencies, embedding scales) their values.

    They are built without storage; transformers fills them as it does in ``from_pretrained``, for which everything
    that has been loaded is marked as initialised.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()


def stored_dtype(source: Source, model_config: Any, dtype: str) -> torch.dtype:
    """The type that weights are saved in: the one asked for, or their own; bfloat16 for quantised ones."""
    if dtype != "auto":
        return DTYPES[dtype]
    if source.gguf_file:
        return torch.float32
    if model_config.dtype is not None:
        return model_config.dtype
    if source.quantization is not None:
        return torch.bfloat16
    folder = weights_folder(source)
    if folder is None or not any(folder.glob("*.safetensors")):  # a plan needs no weights
        return torch.float32
    return WeightFiles(folder).dtype
