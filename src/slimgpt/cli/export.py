"""``slimgpt export`` and ``slimgpt verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimgpt.cli.console import app, check_json, handle_errors, out, show, silence_libraries, write_json

if TYPE_CHECKING:
    from slimgpt.exporting.run import ExportReport
    from slimgpt.exporting.verification import Verification

SlimArgument = Annotated[Path, typer.Argument(metavar="SLIM", help="The folder that `slimgpt prune` wrote.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")]


@app.command()
@handle_errors
def export(
    slim: SlimArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, or the .gguf file.")],
    to: Annotated[str, typer.Option(help="gguf, hf-uniform, padded, nemotron-nas, onnx or openvino.")],
    quantize: Annotated[
        str | None,
        typer.Option(
            help="For GGUF: F32, F16, BF16, Q8_0, or a type of llama.cpp's quantiser such as Q4_K_M.",
            show_default="F16",
        ),
    ] = None,
    tokenizer_pre: Annotated[
        str | None,
        typer.Option(help="For GGUF: llama.cpp's name of how the tokenizer splits text.", show_default="found"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with SLIM in the real engine where it is installed.")
    ] = True,
    json_file: JsonOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write SLIM in a form that other engines read, and compare the two."""
    from slimgpt.exporting.run import export as run

    silence_libraries()
    check_json(json_file, overwrite)
    with out.status(f"writing {show(output)}"):
        report = run(
            slim, output, to, quantize=quantize, tokenizer_pre=tokenizer_pre, overwrite=overwrite, check=verify
        )
    write_json(json_file, report.to_json())
    print_export(report)


@app.command()
@handle_errors
def verify(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder of a stock class, or a .gguf file.")],
    against: Annotated[Path, typer.Option(metavar="SLIM", help="The folder that it was made from.")],
    text: Annotated[
        str | None, typer.Option(help="A text file, or 'demo'.", show_default="a paragraph of ours")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to compare.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    json_file: JsonOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
) -> None:
    """Run EXPORT in its engine and SLIM in transformers on the same tokens, and compare logits and perplexity."""
    from slimgpt.exporting.verification import verify as run

    silence_libraries()
    check_json(json_file, overwrite)
    with out.status("running both"):
        result = run(exported, against, text=text, max_tokens=max_tokens, window=window)
    write_json(json_file, result.to_json())
    print_verification(result)
    result.check(exported)


def print_export(report: ExportReport) -> None:
    """Print the exported file or folder, and its comparison."""
    out.print(f"wrote {show(report.path)} ({report.bytes:,} bytes)", soft_wrap=True, highlight=False)
    for note in report.notes:
        out.print(f"[yellow]note:[/] {show(note)}", soft_wrap=True)
    if report.verification is not None:
        print_verification(report.verification)
    else:
        out.print(f"not verified: {show(report.unverified)}", soft_wrap=True)


def print_verification(result: Verification) -> None:
    """The comparison in a few lines."""
    same, of = result.continuations
    bits = "equal to the bit" if result.identical else f"at most {result.largest:.2g} apart"
    template = {None: "none", True: "the same", False: "different"}[result.chat_template]
    out.print(
        f"{result.engine}: perplexity {result.perplexity:.4f}, the slim folder {result.reference:.4f} "
        f"({result.difference:+.4%}) over {result.tokens:,} tokens at window {result.window}; logits {bits}; "
        f"{same} of {of} greedy continuations the same; chat template: {template}",
        soft_wrap=True,
        highlight=False,
    )
