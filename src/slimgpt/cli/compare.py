"""``slimgpt compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.cli.evaluate import (
    CodeOption,
    DataOption,
    FewshotOption,
    LimitOption,
    PasskeyOption,
    TasksHelp,
    TemplateOption,
    whole_numbers,
)
from slimgpt.cli.options import DeviceOption, DtypeOption, TrustOption, help_panels
from slimgpt.cli.progress import count_bar
from slimgpt.cli.speed import BatchOption, NewOption, PromptOption, RoundsOption

if TYPE_CHECKING:
    from slimgpt.comparison.result import Comparison

STYLES = {"good": "green", "bad": "red", "": "dim"}
"""Of a change, by its verdict."""


@app.command()
@handle_errors
@help_panels(
    {
        "Texts": "text window max_tokens long passkey samples seeds",
        "Tasks": "tasks limit num_fewshot data_dir chat_template confirm_run_unsafe_code",
        "Speed": "speed batch prompt new_tokens rounds",
        "Resources": "device dtype trust_remote_code",
        "Output": "output overwrite update_card",
    }
)
def compare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The dense model: a hub id, a local folder, a .gguf file, or 'demo'.")
    ],
    slim: Annotated[
        list[str],
        typer.Argument(
            metavar="SLIM",
            help="One or more models to compare with it; NAME=FOLDER,FOLDER,... is one column, such as prunings with "
            "different seeds.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to write.")] = Path(
        "slimgpt-compare"
    ),
    text: Annotated[str, typer.Option(help="Text files, wikitext2, ptb, c4 or demo, separated by commas.")] = "demo",
    window: Annotated[str, typer.Option(help="Tokens per window, for example 128,2048.")] = "128",
    max_tokens: Annotated[int | None, typer.Option(help="Use only this many tokens of each text.")] = None,
    tasks: Annotated[str | None, typer.Option(help=TasksHelp)] = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    data_dir: DataOption = None,
    chat_template: TemplateOption = False,
    confirm_run_unsafe_code: CodeOption = False,
    long: Annotated[
        int | None, typer.Option(help="Also measure perplexity by position, in windows of this many tokens.")
    ] = None,
    passkey: PasskeyOption = None,
    samples: Annotated[int, typer.Option(help="Number of generated samples on the page, 0 to 4.")] = 3,
    seeds: Annotated[
        int,
        typer.Option(help="Number of measurements, each with other task rows (--limit), examples and windows."),
    ] = 1,
    update_card: Annotated[
        bool,
        typer.Option("--update-card", help="Add the results to the model card and the report of every SLIM folder."),
    ] = False,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time all models in turn.")] = True,
    batch: BatchOption = "1",
    prompt: PromptOption = 512,
    new_tokens: NewOption = 128,
    rounds: RoundsOption = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a comparison.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare BASE with its slim versions: a table, a plot and an HTML page."""
    windows = tuple(whole_numbers(window, "--window"))
    lengths = tuple(whole_numbers(passkey, "--passkey")) if passkey else ()
    batches = tuple(whole_numbers(batch, "--batch")) if speed else ()
    from slimgpt.comparison.compare import compare as run
    from slimgpt.comparison.model_result import CompareConfig
    from slimgpt.evaluation.tasks import task_names

    silence_libraries()
    config = CompareConfig(
        texts=tuple(word.strip() for word in text.split(",")),
        windows=windows,
        max_tokens=max_tokens,
        tasks=tuple(task_names(tasks)) if tasks is not None else (),
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        long_window=long,
        passkey=lengths,
        batches=batches,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        samples=samples,
        seeds=seeds,
    )
    comparison = run(
        base,
        slim,
        output,
        config,
        data_dir=data_dir,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        update_cards=update_card,
        say=lambda words: out.print(f"[dim]{escape(words)}[/]"),
        counter=count_bar,
    )
    print_comparison(comparison)
    folder = show(output)
    out.print(f"table: {folder}/compare.json\nplot:  {folder}/quality.png\npage:  {folder}/report.html")


def print_comparison(comparison: Comparison) -> None:
    """The table, with ratios to the base; in colour only what is more than chance."""
    table = Table("", *(escape(side.name) for side in comparison.sides))
    for row in comparison.table():
        cells = []
        for index in range(len(comparison.sides)):
            change, spread = row.change_text(index), row.spread_text(index)
            value = row.text(index) + (f"\n[dim]{spread}[/]" if spread else "")
            cells.append(value + (f"\n[{STYLES[row.verdict(index)]}]{change}[/]" if change else ""))
        table.add_row(escape(row.name) + (f"\n[yellow]{escape(row.note)}[/]" if row.note else ""), *cells)
    out.print(table)
