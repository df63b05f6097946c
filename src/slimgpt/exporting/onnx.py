"""ONNX: the model with its cache as inputs and outputs, by torch's own exporter, for layers of any widths."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from slimgpt.errors import ExportError
from slimgpt.exporting.decoder_graph import DecoderGraph, check_graph, window_inputs
from slimgpt.exporting.hf_folder import write_rest
from slimgpt.exporting.source import ExportSource
from slimgpt.models.loading import load

MODEL_FILE = "model.onnx"
"""The file of a folder that ONNX Runtime reads; the weights lie beside it."""

OPSET = 18


def installed() -> bool:
    """Whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def check_onnx(exported: ExportSource) -> None:
    """Refuse what cannot be exported, before any work.

    Raises:
        ExportError: what torch's exporter needs is not installed, or the model cannot become a graph.
    """
    check_graph(exported)
    if importlib.util.find_spec("onnxscript") is None:
        raise ExportError("--to onnx needs what torch exports with; install it with: pip install onnx onnxscript")


def write_onnx(exported: ExportSource, folder: Path) -> list[str]:
    """The model as ONNX files, with config and tokenizer; notes. Names of inputs and outputs are those of optimum."""
    graph = DecoderGraph(load(str(exported.folder), dtype="float32")[0]).eval()
    batch_and_tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    cache = tuple({0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in graph.past_names)
    log = logging.getLogger("torch.onnx")
    before = log.level
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about torch
        log.setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            graph.example(),
            input_names=[*graph.input_names, *graph.past_names],
            output_names=["logits", *graph.present_names],
            dynamic_shapes=(*[batch_and_tokens] * len(graph.input_names), cache),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    log.setLevel(before)
    assert program is not None
    program.save(str(folder / MODEL_FILE), external_data=True)
    exported.config.save_pretrained(folder)
    write_rest(exported, folder)
    return ["its weights are float32; onnxruntime.quantization makes it smaller"]


class OnnxRuntime:
    """A folder of ONNX files on the CPU.

    Attributes:
        engine: its name and version.
    """

    def __init__(self, folder: Path):
        runtime = importlib.import_module("onnxruntime")
        self.session = runtime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
        self.engine = f"onnxruntime {version('onnxruntime')}"

    def logits(self, ids: list[int]) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of a window that knows nothing of those before it."""
        values = window_inputs(ids)
        for port in self.session.get_inputs():
            if port.name.startswith("past_key_values."):
                _, heads, _, size = port.shape
                values[port.name] = np.zeros((1, heads, 0, size), dtype=np.float32)
        return torch.from_numpy(self.session.run(["logits"], values)[0][0].copy())
