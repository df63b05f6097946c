"""Comparison of a dense model with its slim versions: quality, size and speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.inspecting import read_report
from slimgpt.checkpoint.updating import update_card
from slimgpt.comparison.cache import cache_folder
from slimgpt.comparison.columns import columns
from slimgpt.comparison.html_report import write_page
from slimgpt.comparison.measure import Measurer, ProgressFactory
from slimgpt.comparison.model_result import CompareConfig, ModelResult
from slimgpt.comparison.plots import plot_quality
from slimgpt.comparison.result import Comparison
from slimgpt.comparison.timing import time_models
from slimgpt.errors import UsageError
from slimgpt.evaluation.card_figures import task_figures, text_figures
from slimgpt.evaluation.corpora import read_text
from slimgpt.evaluation.perplexity import check_protocol
from slimgpt.evaluation.samples import QUESTIONS
from slimgpt.evaluation.speed import check_generation
from slimgpt.evaluation.tasks import check_chat_template, check_tasks
from slimgpt.io.folders import COMPARISON_FOLDER, check_output, new_folder
from slimgpt.models.loading import load_config, load_tokenizer
from slimgpt.models.lookup import check_context
from slimgpt.models.source import locate
from slimgpt.runtime.interrupts import interrupts_restored


def compare(
    base: str,
    slim: Sequence[str],
    output: str | Path,
    wanted: CompareConfig | None = None,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    update_cards: bool = False,
    say: Callable[[str], object] = str,
    counter: ProgressFactory | None = None,
) -> Comparison:
    """Measure a model and its slim versions; write ``compare.json``, ``quality.png``, ``quality.svg``, ``report.html``.

    Finished measurements are cached beside ``output`` until it is complete, so that the same call resumes a killed
    comparison. Speed is not cached: all models are timed in one run.

    Args:
        base: the dense model, as :func:`slimgpt.load` takes it.
        slim: one or more slim models. ``NAME=MODEL,MODEL,...`` is one column called NAME with several prunings, such as
            those of several seeds: means over them, with their standard deviation.
        output: the folder to write.
        wanted: settings of the measurements; by default those of :class:`CompareConfig`.
        data_dir: where named texts and rows of tasks are files; from the hub if not given.
        update_cards: add the figures of every slim folder to its report and card.
        say: called with a message before each stage.
        counter: opens a progress bar; see :data:`ProgressFactory`.

    Raises:
        SlimGPTError: a model, a text or a task cannot be had; the folder exists.
    """
    config = wanted or CompareConfig()
    check_output(output, overwrite, kind=COMPARISON_FOLDER)
    every = columns(base, slim)
    base = every[0].models[0]
    names = [column.models[0] for column in every]
    models = list(dict.fromkeys(model for column in every for model in column.models))
    _check(models, config, data_dir, trust_remote_code)
    folders = _folders_with_cards(models[1:], config) if update_cards else {}
    texts = [read_text(text, data_dir) for text in config.texts]
    cache = cache_folder(Path(output).expanduser().absolute())
    measurer = Measurer(
        base, config, texts, cache, data_dir, device, dtype, trust_remote_code=trust_remote_code, new_progress=counter
    )
    with _kept(cache), new_folder(output, overwrite, COMPARISON_FOLDER) as folder:
        results = []
        for column in every:
            say(f"measuring {column.label}")
            results.append(measurer.measure(column))
        timings = None
        if config.batches:
            say("timing all models in turn")
            with measurer.progress_bar("timing") as on_start:
                step = on_start(len(config.batches) * (config.rounds + 1)) if on_start else None
                timings = time_models(
                    names,
                    base,
                    config.batches,
                    config.prompt,
                    config.new_tokens,
                    config.rounds,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    progress=lambda *_: step(1) if step else None,
                )
        comparison = Comparison(tuple(results), timings, config)
        (folder / "compare.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
        for suffix in ("png", "svg"):
            plot_quality(comparison, folder / f"quality.{suffix}")
        write_page(comparison, folder / "report.html")
    shutil.rmtree(cache, ignore_errors=True)
    for column, result in zip(every, results):
        for name, run in zip(column.models, result.runs):
            if name in folders:
                update_card(folders[name], _card_figures(run))
    for folder in folders.values():
        say(f"updated the card and the report in {folder}")
    return comparison


@contextmanager
def _kept(cache: Path) -> Iterator[None]:
    """Say where finished measurements are when a comparison is interrupted."""
    try:
        with interrupts_restored():
            yield
    except KeyboardInterrupt:
        if not cache.is_dir():
            raise
        raise KeyboardInterrupt(f"what is measured is kept in {cache}; the same command goes on") from None


def _check(names: Sequence[str], config: CompareConfig, data_dir: str | Path | None, trust_remote_code: bool) -> None:
    """Check the settings against every model before the first one is measured.

    Raises:
        SlimGPTError: a measurement that some model does not allow.
    """
    if not 0 <= config.samples <= len(QUESTIONS):
        raise UsageError(f"samples is {config.samples}; it must be from 0 to {len(QUESTIONS)}")
    if config.seeds < 1:
        raise UsageError(f"seeds is {config.seeds}; it must be at least 1")
    windows = [*config.windows, *([] if config.long_window is None else [config.long_window])]
    for window in windows:
        check_protocol(window)
    for source in [locate(name) for name in names]:
        model_config = load_config(source, trust_remote_code)
        for window in windows:
            check_context(model_config, "a window", window)
        for length in config.passkey:
            check_context(model_config, "a text", length)
        for batch in config.batches:
            check_generation(model_config, config.prompt, config.new_tokens, config.rounds, batch)
    if not config.tasks and (config.chat_template or config.confirm_run_unsafe_code):
        raise UsageError("--chat-template and --confirm-run-unsafe-code are for tasks: give --tasks, too")
    if config.chat_template:
        for source in [locate(name) for name in names]:
            check_chat_template(load_tokenizer(source, trust_remote_code), source.name)
    if config.tasks:
        check_tasks(
            config.tasks,
            config.limit,
            config.num_fewshot,
            data_dir,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        )


def _folders_with_cards(names: Sequence[str], config: CompareConfig) -> dict[str, Path]:
    """The slim folders of ours among some models.

    Raises:
        UsageError: several seeds: a card names single measurements; or there is no such folder.
    """
    if config.seeds > 1:
        raise UsageError(
            f"cards have the figures of one measurement, and there are {config.seeds} seeds; leave out one of the two"
        )
    sources = {name: locate(name) for name in names}
    folders = {
        name: source.folder
        for name, source in sources.items()
        if source.folder is not None
        and source.gguf_file is None
        and source.adapter is None  # the figures are not those of the folder without it
        and read_report(source.folder) is not None
    }
    if not folders:
        raise UsageError("update_card: none of the models to compare is a folder that slimgpt wrote; leave it out")
    return folders


def _card_figures(run: ModelResult) -> list[dict[str, Any]]:
    figures = [text_figures(text, result) for text, result in run.perplexities]
    return [*figures, *(task_figures(run.tasks) if run.tasks is not None else ())]
