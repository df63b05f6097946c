"""OpenVINO: the model with its cache inside, by OpenVINO's own converter, for layers of any widths."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgpt.errors import ExportError
from slimgpt.exporting.decoder_graph import DecoderGraph, check_graph, window_inputs
from slimgpt.exporting.hf_folder import write_rest
from slimgpt.exporting.source import ExportSource
from slimgpt.models.loading import load

MODEL_FILE = "openvino_model.xml"
"""The file of a folder that OpenVINO reads; the weights lie beside it."""


def installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def check_openvino(exported: ExportSource) -> None:
    """Refuse what cannot be converted, before any work.

    Raises:
        ExportError: OpenVINO is not installed, or the model cannot become a graph.
    """
    check_graph(exported)
    if not installed():
        raise ExportError("--to openvino needs OpenVINO; install it with: pip install openvino")


def write_openvino(exported: ExportSource, folder: Path) -> list[str]:
    """The model as OpenVINO's files, with config and tokenizer; notes.

    The inputs are those of optimum-intel's models, which OpenVINO GenAI runs: the cache is a state of the model.
    """
    openvino = importlib.import_module("openvino")
    transformations = importlib.import_module("openvino._offline_transformations")
    graph = DecoderGraph(load(str(exported.folder), dtype="float32")[0], beams=True)
    shapes = [[-1, -1]] * 3 + [[-1]] + [[-1, heads, -1, size] for heads, size in graph.cache_sizes]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trace about sizes, which are checked by running the model
        model = openvino.convert_model(
            graph, example_input=graph.example(), input=[openvino.PartialShape(shape) for shape in shapes]
        )
    for port, name in zip(model.inputs, [*graph.input_names, *graph.past_names]):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *graph.present_names]):
        port.get_tensor().set_names({name})
    transformations.apply_make_stateful_transformation(model, dict(zip(graph.past_names, graph.present_names)))
    openvino.save_model(model, str(folder / MODEL_FILE), compress_to_fp16=False)
    exported.config.save_pretrained(folder)
    write_rest(exported, folder)
    notes = ["its weights are float32; openvino.save_model(..., compress_to_fp16=True) or NNCF makes it smaller"]
    if importlib.util.find_spec("openvino_tokenizers") is None:
        return [
            *notes,
            "for OpenVINO GenAI it needs its tokenizer too: pip install openvino-tokenizers, then export again",
        ]
    tokenizers = importlib.import_module("openvino_tokenizers")
    pair = tokenizers.convert_tokenizer(exported.tokenizer(), with_detokenizer=True)
    for part, name in zip(pair, ("openvino_tokenizer", "openvino_detokenizer")):
        openvino.save_model(part, str(folder / f"{name}.xml"))
    return notes


class OpenVino:
    """A folder of OpenVINO's files on the CPU, in float32.

    Attributes:
        engine: its name and version.
    """

    def __init__(self, folder: Path):
        openvino = importlib.import_module("openvino")
        model: Any = openvino.Core().compile_model(str(folder / MODEL_FILE), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.request = model.create_infer_request()
        self.engine = f"openvino {version('openvino')}"

    def logits(self, ids: list[int]) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of a window that knows nothing of those before it."""
        self.request.reset_state()
        values = {**window_inputs(ids), "beam_idx": np.zeros(1, dtype=np.int32)}
        return torch.from_numpy(self.request.infer(values)["logits"][0].copy())
