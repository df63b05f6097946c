"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slimgpt.planning.plan import Plan
    from slimgpt.pruning.report import LayerReport

    OnLayer = Callable[[LayerReport, Plan], None]
    OnMeasured = Callable[[int, int, float], None]
    OnDistilled = Callable[[int, int, float, float], None]
    OnRehearsed = Callable[[str, int, int, float], None]
    Calls = tuple[OnLayer, OnMeasured, OnDistilled, OnRehearsed]


ModelArgument = Annotated[str, typer.Argument(help="A hub id, a local folder, a .gguf file, or 'demo'.")]


TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code from the model's repository run.")
]


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")]
