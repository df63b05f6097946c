"""A model and its slim versions, side by side: what was lost, what was won."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from slimgpt.comparison.cache import kept_folder
from slimgpt.comparison.html_report import write_page
from slimgpt.comparison.measure import CompareConfig, Counter, Measurer
from slimgpt.comparison.plots import plot_quality
from slimgpt.comparison.result import Comparison
from slimgpt.comparison.timing import time_models
from slimgpt.evaluation.corpora import read_text
from slimgpt.evaluation.perplexity import check_protocol
from slimgpt.evaluation.speed import check_generation
from slimgpt.evaluation.tasks import check_tasks
from slimgpt.io.folders import COMPARISON_FOLDER, check_output, new_folder
from slimgpt.models.loading import load_config
from slimgpt.models.lookup import check_context
from slimgpt.models.source import locate


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
    say: Callable[[str], object] = str,
    counter: Counter | None = None,
) -> Comparison:
    """Measure a model and its slim versions; write ``compare.json``, ``quality.png``, ``quality.svg``, ``report.html``.

    Until these are there, what has been measured is kept beside them: a comparison that was killed goes on when the
    same one is asked for again. Speed is measured of all models in one run, and is not kept.

    Args:
        base: a model as :func:`slimgpt.load` takes it.
        slim: one or more others.
        output: the folder to write.
        data_dir: where named texts and rows of tasks are files; from the hub if not given.
        say: told what happens next.
        counter: opens a progress bar.

    Raises:
        SlimGPTError: a model, a text or a task cannot be had; the folder exists.
    """
    wanted = wanted or CompareConfig()
    names = [base, *slim]
    check_output(output, overwrite, kind=COMPARISON_FOLDER)
    _check(names, wanted, data_dir, trust_remote_code)
    texts = [read_text(text, data_dir) for text in wanted.texts]
    kept = kept_folder(Path(output).expanduser().absolute())
    measuring = Measurer(wanted, texts, kept, data_dir, device, dtype, trust_remote_code, counter)
    with new_folder(output, overwrite, COMPARISON_FOLDER) as folder:
        sides = []
        for name, label in zip(names, _labels(names)):
            say(f"measuring {label}")
            sides.append(measuring.side(name, label))
        timings = None
        if wanted.batches:
            say("timing all models in turn")
            with measuring.bar("rounds") as on_start:
                step = on_start(len(wanted.batches) * (wanted.rounds + 1)) if on_start else None
                timings = time_models(
                    names,
                    base,
                    wanted.batches,
                    wanted.prompt,
                    wanted.new_tokens,
                    wanted.rounds,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    progress=lambda *_: step(1) if step else None,
                )
        found = Comparison(tuple(sides), timings, wanted)
        (folder / "compare.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        for suffix in ("png", "svg"):
            plot_quality(found, folder / f"quality.{suffix}")
        write_page(found, folder / "report.html")
    shutil.rmtree(kept, ignore_errors=True)
    return found


def _check(names: Sequence[str], wanted: CompareConfig, data_dir: str | Path | None, trust_remote_code: bool) -> None:
    """Refuse what cannot be measured of every model before the first one is."""
    windows = [*wanted.windows, *([] if wanted.long_window is None else [wanted.long_window])]
    for window in windows:
        check_protocol(window)
    for source in [locate(name) for name in names]:
        config = load_config(source, trust_remote_code)
        for window in windows:
            check_context(config, "a window", window)
        for length in wanted.passkey:
            check_context(config, "a text", length)
        for batch in wanted.batches:
            check_generation(config, wanted.prompt, wanted.new_tokens, wanted.rounds, batch)
    if wanted.tasks:
        check_tasks(wanted.tasks, wanted.limit, wanted.num_fewshot, data_dir)


def _labels(names: Sequence[str]) -> list[str]:
    """Short names, told apart where two folders have the same."""
    short = [locate(name).name for name in names]
    return [label if short.count(label) == 1 else name for label, name in zip(short, names)]
