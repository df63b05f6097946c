"""The quality table: our method, the paper's and what people use instead, at the same number of parameters.

    python benchmarks/quality.py --data data --keep runs/quality --out benchmarks/results/quality
    python benchmarks/quality.py --data data --keep runs/quality --validation --methods paper,slimgpt \
        --ratios 0.2 --models smollm2                       # to choose settings; prints the table only
    python benchmarks/quality.py ... --list                 # what is done and what is to be done
    python benchmarks/quality.py ... --methods slimgpt,slimgpt-uniform,slimgpt-4-widths  # what equal layers cost
    python benchmarks/quality.py ... --rows 'smollm2/flap*' # some rows alone
    python benchmarks/quality.py ... --set damping=0.001    # an argument of slimgpt.prune, or a calibration setting

Every finished row is kept in a file of its own under --keep, so that an interrupted run goes on. Several processes
with the same --keep divide the rows: none takes one that another is at. On one GPU they need CUDA's MPS
(`nvidia-cuda-mps-control -d`), else they wait for each other; their seconds say little either way. --out writes the
page, a JSON file and two plots of all rows that are finished. The folder of --data holds what
`benchmarks/quality_table/texts.py` names, and the zero-shot tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from baselines import COMPARED, METHODS
from quality_table.ablations import ablation_rows
from quality_table.models import MODELS
from quality_table.report import table, write
from quality_table.rows import DENSE, Result, Row, Store
from quality_table.run import Bench, Settings
from quality_table.texts import SOURCES, Texts
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from slimgpt.errors import SlimGPTError, UsageError

console = Console()


def main_rows(models: list[str], methods: list[str], ratios: list[float], changes: tuple[tuple[str, Any], ...]):
    """The rows of the main table: dense, then every method, then the baselines with our repair."""
    for model in models:
        yield Row(model, DENSE, 0.0)
        for ratio in ratios:
            for method in methods:
                entry = METHODS[method]
                # `paper` is what others are compared with, so it stays as it is.
                yield Row(model, method, ratio, changes=changes if entry.ours and method != "paper" else ())
                if entry.repairable:
                    yield Row(model, method, ratio, repair=True)


def chosen(text: str, known: Any, kind: str) -> list[str]:
    """Names from a list with commas.

    Raises:
        UsageError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"{kind} '{name}' is unknown; choose {', '.join(known)}")
    return names


def parse_change(text: str) -> tuple[str, Any]:
    """``name=value``; the value is read as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text} is no name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(
    data: Annotated[Path, typer.Option(help="Folder of texts and tasks.")] = Path("data"),
    keep: Annotated[Path, typer.Option(help="Folder of finished rows.")] = Path("runs/quality"),
    out: Annotated[Path | None, typer.Option(help="Write page, JSON and plots there; without a suffix.")] = None,
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "smollm2,smollm2-mha",
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = ",".join(COMPARED),
    ratios: str = "0.2,0.33,0.5",
    rows: Annotated[list[str] | None, typer.Option(help="Only rows whose name has or fits this; repeatable.")] = None,
    ablations: Annotated[bool, typer.Option(help="Also the paper's ablations.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="name=value for our methods but `paper`; repeatable.")
    ] = None,
    gemma: Annotated[str | None, typer.Option(help="Where Gemma-3-270M is; adds model gemma3.")] = None,
    source: Annotated[str, typer.Option(help=f"Calibration text: {', '.join(SOURCES)}.")] = "c4",
    num_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    max_tokens: Annotated[int, typer.Option(help="Of each held-out text; 0 takes all.")] = 32_768,
    tasks: Annotated[int, typer.Option(help="Examples of each zero-shot task; 0 leaves them out.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of forward passes: float32, or bfloat16 where it is faster.")] = "float32",
    device: Annotated[str, typer.Option(help="Where forward passes run and matrices are solved: cpu, cuda.")] = "cpu",
    keep_models: Annotated[
        bool,
        typer.Option(help="Keep our methods' slim models too: measures are then added without pruning again."),
    ] = False,
    validation: Annotated[bool, typer.Option(help="Measure on the validation texts, to choose settings.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the rows and do nothing.")] = False,
    anew: Annotated[bool, typer.Option(help="Measure the chosen rows again.")] = False,
) -> None:
    """Measure what is missing, then show and write all that is known."""
    logging.disable_progress_bar()
    try:
        wanted = chosen(models, MODELS, "model") + (["gemma3"] if gemma and "gemma3" not in models else [])
        if "gemma3" in wanted and not gemma:
            raise UsageError("model gemma3 is nowhere; give its folder or hub id as --gemma")
        shares = [float(ratio) for ratio in ratios.split(",")]
        changed = tuple(parse_change(text) for text in changes or [])
        settings = Settings(
            source,
            num_samples,
            seq_len,
            seed,
            dtype,
            device,
            max_tokens or None,
            validation,
            tasks,
            {"gemma3": gemma or ""},
        )
        compared = list(main_rows(wanted, chosen(methods, METHODS, "method"), shares, changed))
        ablated = list(ablation_rows(wanted, shares[0], settings)) if ablations else []
        bench = Bench(Texts(data.expanduser()), Store(keep.expanduser()), settings, keep_models=keep_models)
        selected = [
            row
            for row in dict.fromkeys([*compared, *ablated])
            if not rows or any(row.matches(pattern) for pattern in rows)
        ]
        todo = [row for row in selected if anew or bench.missing(row)]
    except SlimGPTError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    if show:
        for row in selected:
            missing = bench.missing(row)
            state = f"to do: {', '.join(missing)}" if missing else "done"
            console.print(f"{row.name:50} {state}", highlight=False, soft_wrap=True, markup=False)
        return
    failed = work(bench, todo, {row: bench.result(row) for row in todo} if anew else {})
    main_results = [(row, bench.reported(row)) for row in compared]
    ablation_results = [(row, bench.reported(row)) for row in ablated]
    for model in wanted:
        references = [(row, bench.reported(row)) for row in main_rows([model], ["paper"], shares, ())]
        for results in (main_results, ablation_results) if ablations else (main_results,):
            console.print(Markdown("\n".join(table(results, settings, model, references))))
    if out is not None:
        for file in write(main_results, ablation_results, settings, out):
            console.print(f"wrote {file}")
    exit_if_any(failed)


def exit_if_any(failed: Mapping[str, str]) -> None:
    """Name the rows that failed, with their reasons, and end with 1 if there are any."""
    for name, reason in failed.items():
        console.print(f"[red]{name}: {reason}[/red]")
    if failed:
        raise typer.Exit(1)


def work(bench: Bench, todo: list[Row], old: Mapping[Row, Result]) -> dict[str, str]:
    """Work rows out one after another; a row that fails is named and the others go on.

    Args:
        old: rows to measure again, with what was known of them at the start: what is known otherwise by now, another
            process has measured.
    """
    failed: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("rows", total=len(todo))
        step = progress.add_task("", total=None)
        bench.say = lambda step_name, done, total: progress.update(
            step, description=step_name, completed=done, total=total
        )
        for row in todo:
            progress.update(step, description=row.name, completed=0, total=None)
            try:
                with bench.claim(row) as mine:
                    anew = row in old and bench.result(row) == old[row]
                    if not mine or not (anew or bench.missing(row)):  # of another process by now
                        continue
                    result = bench.work_out(row, anew)
            except SlimGPTError as error:
                failed[row.name] = str(error)
                continue
            finally:
                progress.advance(whole)
            figures = {name: round(measure["value"], 3) for name, measure in result.measures.items()}
            seconds = result.found.get("seconds", 0.0)
            line = f"{row.name}: achieved {result.found['achieved']:.4f}, {figures}, {seconds:.0f} s"
            progress.console.print(line, highlight=False, soft_wrap=True, markup=False)
    return failed


if __name__ == "__main__":
    typer.run(main)
