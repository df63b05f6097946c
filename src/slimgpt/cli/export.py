"""``slimgpt export`` and ``slimgpt verify``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimgpt.cli.console import (
    app,
    check_json,
    handle_errors,
    out,
    print_uploaded,
    show,
    silence_libraries,
    write_json,
)
from slimgpt.cli.options import PrivateOption, PushOption, TrustOption
from slimgpt.cli.progress import bar, phases
from slimgpt.errors import UsageError

if TYPE_CHECKING:
    from slimgpt.exporting.engine_verification import EngineVerification
    from slimgpt.exporting.run import ExportReport
    from slimgpt.exporting.verification import Verification

SlimArgument = Annotated[Path, typer.Argument(metavar="SLIM", help="The folder that `slimgpt prune` wrote.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")]


@app.command()
@handle_errors
def export(
    slim: SlimArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, or the .gguf file.")],
    *,
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
        typer.Option(help="For GGUF: llama.cpp's name of the pre-tokenizer.", show_default="found"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with SLIM in the engine, if it is installed.")
    ] = True,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    json_file: JsonOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write SLIM in a form that another engine reads, and check that it computes the same."""
    check_json(json_file, overwrite)
    from slimgpt.exporting.run import export as run

    silence_libraries()
    with export_phases() as callbacks:
        report = run(
            slim, output, to, quantize=quantize, tokenizer_pre=tokenizer_pre, overwrite=overwrite, check=verify,
            push_to_hub=push_to_hub, private=private, **callbacks,
        )  # fmt: skip
    write_json(json_file, report.to_json())
    print_export(report)
    print_uploaded(push_to_hub)


@app.command()
@handle_errors
def verify(
    exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="An exported folder or .gguf file.")],
    *,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="SLIM", help="The slim folder that it was made from.", show_default="EXPORT itself with --engine"
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Run EXPORT in this engine: vllm, mlx, llama.cpp, openvino, onnxruntime, transformers.",
            show_default="in this process",
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Python of the environment with the engine.", show_default="this one"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --engine: prompts, one per line.", show_default="five built-in prompts"
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="With --engine: largest difference of a log-probability.",
            show_default="0.001; for GGUF below F32 the perplexity counts",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file, or 'demo'.", show_default="a built-in paragraph")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to compare.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    json_file: JsonOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check that EXPORT computes in its engine what SLIM computes in transformers.

    The exit code is 1 where the two differ by more than the form allows.
    """
    check_json(json_file, overwrite)
    if engine is None:
        options = {"--python": python, "--prompts": prompts, "--tolerance": tolerance}
        for option, value in options.items():
            if value is not None:
                raise UsageError(f"{option} is for an engine in a process of its own; name it with --engine")
        if against is None:
            raise UsageError("without --engine there is nothing to compare with; name the slim folder with --against")
        from slimgpt.exporting.verification import verify as run

        silence_libraries()
        with bar("comparing") as step:
            result = run(exported, against, text=text, max_tokens=max_tokens, window=window, progress=step)
        write_json(json_file, result.to_json())
        print_verification(result)
        result.check(exported)
        return
    from slimgpt.exporting.engine_verification import read_prompts, verify_in_engine

    with out.status(f"running {show(engine)}"):
        compared = verify_in_engine(
            exported,
            against,
            engine=engine,
            python=python,
            prompts=read_prompts(prompts),
            text=text,
            max_tokens=max_tokens,
            window=window,
            tolerance=tolerance,
            trust_remote_code=trust_remote_code,
        )
    write_json(json_file, compared.to_json())
    print_engine_verification(compared)
    compared.check(exported)


@contextmanager
def export_phases() -> Iterator[dict[str, Any]]:
    """The bars of an export; yields the callbacks of :func:`slimgpt.export`."""
    with phases() as shown:
        shown.step("writing", 0, None)
        counted = False

        def on_written(done: int, total: int) -> None:
            nonlocal counted
            counted = True
            shown.step("writing", done, total)

        def end_writing() -> None:
            if not counted:  # a converter that tells nothing
                on_written(1, 1)

        def on_compared(done: int, total: int) -> None:
            end_writing()
            shown.step("comparing", done, total)

        yield {"on_written": on_written, "on_compared": on_compared}
        end_writing()


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


def print_engine_verification(result: EngineVerification) -> None:
    """The comparison with an engine: the figures, then every prompt whose continuations differ."""
    same, ties, of = result.continuations
    own = [prompt.same_ids for prompt in result.prompts if prompt.same_ids is not None]
    versions = ", ".join(f"{name} {version}" for name, version in list(result.versions.items())[1:])
    parts = [
        f"{result.tokens:,} log-probabilities, at most {result.largest:.2g} apart, {result.mean:.2g} on average",
        f"perplexity {result.perplexity:.4f}, the slim folder {result.reference:.4f}",
        f"{same} of {of} greedy continuations the same{f', {ties} part at a tie' if ties else ''}",
        *([f"its tokenizer agrees on {sum(own)} of {len(own)} prompts"] if own else []),
    ]
    engine = f"{result.engine} ({versions})" if versions else result.engine
    out.print(f"{show(engine)}: {'; '.join(parts)}", soft_wrap=True, highlight=False)
    for prompt in result.prompts:
        if not prompt.same:
            out.print(
                f"  {show(repr(prompt.prompt))} parts at token {prompt.parts_at}"
                f"{', a tie' if prompt.tie else ''} (transformers prefers its own by {prompt.margin:.2g} nats): "
                f"{show(repr(prompt.continuation))}, not {show(repr(prompt.reference))}",
                soft_wrap=True,
                highlight=False,
            )
