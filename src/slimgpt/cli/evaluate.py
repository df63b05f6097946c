"""``slimgpt evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slimgpt.cli.console import app, check_json, handle_errors, out, show, silence_libraries, write_json
from slimgpt.cli.divergence import print_divergence
from slimgpt.cli.options import DeviceOption, DtypeOption, ModelArgument, TrustOption
from slimgpt.cli.progress import bar, count_bar
from slimgpt.errors import UsageError

if TYPE_CHECKING:
    from slimgpt.evaluation.passkey_retrieval import Passkey
    from slimgpt.evaluation.perplexity import Perplexity
    from slimgpt.evaluation.tasks import TaskScores

DataOption = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Read texts and task rows from this folder instead of the hub."),
]
LimitOption = Annotated[int | None, typer.Option(help="Use only this many rows of each task.")]
FewshotOption = Annotated[
    int | None, typer.Option(help="Few-shot examples per question.", show_default="as the task says")
]
PasskeyOption = Annotated[
    str | None, typer.Option(metavar="LENGTHS", help="Passkey retrieval in texts of so many tokens: 512,1024.")
]
TemplateOption = Annotated[
    bool, typer.Option("--chat-template", help="Apply the chat template to the questions of tasks.")
]
CodeOption = Annotated[
    bool, typer.Option("--confirm-run-unsafe-code", help="Allow tasks such as humaneval, which run generated code.")
]
TasksHelp = (
    "Tasks of lm-evaluation-harness by name, separated by commas; 'commonsense' is the usual seven; ifeval, "
    "gsm8k and humaneval have generated answers."
)


@app.command()
@handle_errors
def evaluate(
    model: ModelArgument,
    *,
    text: Annotated[str | None, typer.Option(help="A text file, wikitext2, ptb, c4, or 'demo'.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; papers use 128 or 2048.")] = 128,
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The dense model: also measure the KL divergence from it."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="window: no overlap")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only this many tokens of the text.")] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also measure perplexity by position in the window.")
    ] = False,
    bos: Annotated[
        str, typer.Option(help="BOS token: 'once' at the start of the text, or in every 'window'.")
    ] = "auto",
    tasks: Annotated[str | None, typer.Option(help=TasksHelp)] = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    data_dir: DataOption = None,
    chat_template: TemplateOption = False,
    confirm_run_unsafe_code: CodeOption = False,
    passkey: PasskeyOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    engine: Annotated[
        str,
        typer.Option(help="transformers or llama.cpp; auto: llama.cpp for .gguf files where it is installed."),
    ] = "auto",
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Add the results to the model card and report of MODEL.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure perplexity, KL divergence from a dense model, task scores and passkey retrieval of MODEL."""
    check_json(json_file, overwrite)
    if text is None and tasks is None and passkey is None:
        raise UsageError("nothing to evaluate: give --text, --tasks or --passkey")
    if against is not None and text is None:
        raise UsageError("--against tells a divergence on a text: give --text, too")
    if tasks is None and (chat_template or confirm_run_unsafe_code):
        raise UsageError("--chat-template and --confirm-run-unsafe-code are for tasks: give --tasks, too")
    lengths = whole_numbers(passkey, "--passkey") if passkey else []
    from slimgpt.checkpoint.inspecting import read_report
    from slimgpt.checkpoint.updating import read_own_report
    from slimgpt.checkpoint.updating import update_card as add_to_card
    from slimgpt.evaluation.card_figures import task_figures, text_figures
    from slimgpt.evaluation.contamination import contamination_note
    from slimgpt.evaluation.corpora import read_text
    from slimgpt.evaluation.evaluate import check_same_tokens
    from slimgpt.evaluation.evaluate import evaluate as run
    from slimgpt.evaluation.llama_cpp import engines_of, load_gguf
    from slimgpt.evaluation.passkey_retrieval import passkey as run_passkey
    from slimgpt.evaluation.perplexity import check_protocol
    from slimgpt.evaluation.tasks import check_chat_template, check_tasks, evaluate_tasks
    from slimgpt.models.loading import load
    from slimgpt.models.lookup import check_context
    from slimgpt.models.source import locate

    silence_libraries()
    check_protocol(window, bos, max_tokens, batch_size)
    names = (
        check_tasks(tasks, limit, num_fewshot, data_dir, confirm_run_unsafe_code=confirm_run_unsafe_code)[0]
        if tasks is not None
        else []
    )
    content = read_text(text, data_dir) if text is not None else None
    source = locate(model)
    folder = source.folder
    report = read_report(folder) if folder is not None else None
    if update_card:
        read_own_report(None if source.gguf_file or source.adapter else folder, model)
    figures: list[dict[str, Any]] = []
    engines = engines_of(
        model, against, engine, {"--tasks": tasks, "--passkey": passkey}, {"--dtype": dtype, "--device": device}
    )

    def load_one(name: str) -> Any:
        with out.status(f"loading {show(name)}"):
            in_llama_cpp = engines[name] == "llama.cpp"
            return load_gguf(name) if in_llama_cpp else load(name, dtype, device, trust_remote_code)

    loaded, tokenizer = load_one(model)
    if chat_template:
        check_chat_template(tokenizer)
    base = None
    if against is not None and content is not None:
        base, base_tokenizer = load_one(against)
        check_same_tokens(tokenizer, base_tokenizer, content.content)
    for length in lengths:
        check_context(loaded.config, "a text", length)
    values: dict[str, Any] = {"model": model}
    if content is not None:
        with bar("windows") as step:
            result = run(
                loaded,
                tokenizer,
                content,
                window=window,
                stride=stride,
                max_tokens=max_tokens,
                batch_size=batch_size,
                by_position=by_position,
                bos=bos,
                progress=step,
                against=base,
            )
        del base
        leak = contamination_note(report, content)
        values |= {"text": text, **result.to_json(), "leak": leak}
        print_perplexity(result, content.name, leak)
        figures.append(text_figures(content.name, result))
        if result.divergence is not None:
            print_divergence(result.divergence, result)
    if names:
        with count_bar("tasks") as on_start:
            scores = evaluate_tasks(
                loaded,
                tokenizer,
                names,
                limit,
                num_fewshot,
                data_dir,
                on_start,
                chat_template=chat_template,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
            )
        values["tasks"] = scores.to_json()
        print_scores(scores)
        figures += task_figures(scores)
    if lengths:
        with count_bar("pass key") as on_start:
            retrieval = run_passkey(loaded, tokenizer, lengths, on_start=on_start)
        values["passkey"] = retrieval.to_json()
        print_passkey(retrieval)
    write_json(json_file, values)
    if update_card and folder is not None:
        add_to_card(folder, figures)
        out.print(f"updated the card and the report in {show(folder)}")


def whole_numbers(text: str, option: str) -> list[int]:
    """Numbers from ``1,8``.

    Raises:
        UsageError: anything else.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{option} '{text}' is no list of whole numbers above zero; give for example 512,1024")
    return numbers


def print_perplexity(result: Perplexity, text: str, leak: str | None) -> None:
    """One line with all that the number depends on, the leak among it; positions below."""
    protocol = result.protocol
    stride = f", stride {protocol['stride']}" if protocol["overlap"] else ""
    of_text = protocol["stride"] + protocol["overlap"]
    bos = ", each with BOS" if of_text < result.window else ""
    engine = "" if protocol["engine"].startswith("transformers") else f" in {protocol['engine']}"
    out.print(
        f"perplexity [bold]{result.perplexity:.4f}[/] at window {result.window}{stride}{bos} over "
        f"{result.tokens:,} tokens ({result.predicted:,} predicted) of {text}, {protocol['joining']}, "
        f"{protocol['dtype']}{engine}; per word {result.word_perplexity:.2f}, per byte {result.byte_perplexity:.4f}"
        + (f"  [bold yellow]{leak}[/]" if leak else ""),
        highlight=False,
        soft_wrap=True,
    )
    if result.by_position:
        table = Table("position", "perplexity")
        for first, value in result.by_position.items():
            table.add_row(f"{first}-{min(2 * first, result.window) - 1}", f"{value:.3f}")
        out.print(table)


def print_scores(scores: TaskScores) -> None:
    """A row per task or group, and the mean."""
    table = Table("task", "shots", "rows", "acc", "acc_norm", "other")
    for name, values in scores.scores.items():
        rest = {k: v for k, v in values.items() if k not in ("acc", "acc_norm", "rows") and not k.endswith("_stderr")}
        table.add_row(
            name,
            str(scores.protocol["num_fewshot"].get(name, "")),
            f"{values['rows']:,}" if "rows" in values else "",
            *(
                f"{values[m]:.2%} ± {values.get(m + '_stderr', 0):.2%}" if m in values else ""
                for m in ("acc", "acc_norm")
            ),
            ", ".join(f"{key} {value:.4g}" for key, value in rest.items()),
        )
    out.print(table)
    for name, ending in scores.endings.items():
        out.print(
            f"{show(name)}: {ending.either:.1%} of {ending.answers:,} answers loop ({ending.loops:.1%}) or never stop "
            f"({ending.unstopped:.1%})",
            soft_wrap=True,
            highlight=False,
        )
    for name, words in scores.degenerate_tasks().items():
        out.print(
            f"[yellow]{show(name)}: the model answers {words} of the questions, right or wrong[/]", soft_wrap=True
        )
    mean = ""
    if scores.mean is not None and scores.mean_acc is not None:
        error = "" if scores.mean_stderr is None else f" ± {scores.mean_stderr:.2%}"
        mean = f"mean [bold]{scores.mean:.2%}[/]{error} (acc_norm where a task has it), {scores.mean_acc:.2%} (acc); "
    template = ", through the chat template" if scores.protocol["chat_template"] else ""
    out.print(
        f"{mean}rows from {scores.protocol['rows_from']}{template}, {scores.protocol['harness']}, "
        f"{scores.protocol['dtype']}",
        soft_wrap=True,
        highlight=False,
    )


def print_passkey(retrieval: Passkey) -> None:
    """Shares by length and depth."""
    table = Table("tokens", "found", "by depth, beginning to end")
    for length, share in retrieval.found.items():
        table.add_row(f"{length:,}", f"{share:.0%}", "  ".join(f"{s:.0%}" for s in retrieval.by_depth[length]))
    out.print(table)
