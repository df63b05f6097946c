"""ONNX and OpenVINO through optimum, for models of a stock class."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from slimgpt.errors import ExportError
from slimgpt.exporting.hf_folder import check_uniform, write_uniform
from slimgpt.exporting.source import ExportSource

PACKAGES = {
    "onnx": ("optimum.exporters.onnx", "optimum-onnx"),
    "openvino": ("optimum.exporters.openvino", "optimum-intel"),
}


def check(to: str) -> Callable[[ExportSource], None]:
    """Check that refuses a model that optimum cannot take, before any work."""

    def refuse(exported: ExportSource) -> None:
        check_uniform(exported)
        module, package = PACKAGES[to]
        if not _installed(module):
            raise ExportError(f"--to {to} needs optimum's exporter; install it with: pip install {package}")

    return refuse


def write(to: str) -> Callable[[ExportSource, Path], list[str]]:
    """Writer that hands the model, as a stock class, to optimum."""

    def convert(exported: ExportSource, folder: Path) -> list[str]:
        from importlib import import_module

        stock = folder / "stock"
        stock.mkdir()
        notes = write_uniform(exported, stock)
        import_module(PACKAGES[to][0]).main_export(str(stock), output=folder, task="text-generation-with-past")
        for file in stock.iterdir():
            file.unlink()
        stock.rmdir()
        return notes

    return convert


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
