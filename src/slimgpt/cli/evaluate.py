"""``slimgpt evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slimgpt.cli.console import DeviceOption, DtypeOption, ModelArgument, TrustOption, app, bar, friendly, out, quiet
from slimgpt.errors import OutputError, UsageError


@app.command()
@friendly
def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="A text file, or 'demo' (held-out speeches).")],
    window: Annotated[int, typer.Option(help="Tokens per window; 128 and 2048 are the literature's.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity of MODEL on a text, with the protocol that makes the number comparable."""
    from slimgpt.api import evaluate as run
    from slimgpt.api import read_text
    from slimgpt.models import load

    quiet()
    if json_file is not None and json_file.exists() and not overwrite:
        raise OutputError(f"{json_file} exists; give another file, or pass --overwrite to replace it")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OutputError(
            f"{json_file.absolute().parent} is no folder; make it first, or give another place for --json"
        )
    if window < 2:
        raise UsageError(f"window {window} is too small: a window of n tokens predicts n - 1 of them")
    read_text(text)
    with out.status(f"loading {model}"):
        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
    with bar("windows") as (progress, task):
        result = run(
            loaded,
            tokenizer,
            text,
            window=window,
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    values = {"model": model, "text": text, **result.to_json()}
    if json_file is not None:
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    out.print(
        f"perplexity [bold]{result.perplexity:.4f}[/] at window {result.window} over {result.tokens:,} tokens "
        f"({result.predicted:,} predicted) of {text}, {result.protocol['dtype']}",
        highlight=False,
        soft_wrap=True,
    )
