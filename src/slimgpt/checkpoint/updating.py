"""New figures in the report and on the card of a slim folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.card import EXPORTS, model_card
from slimgpt.checkpoint.card_metadata import CARD_FILE
from slimgpt.checkpoint.inspecting import read_report
from slimgpt.checkpoint.saving import REPORT_FILE, report_text
from slimgpt.errors import ModelError, OutputError, one_line
from slimgpt.io.atomic import write_text
from slimgpt.io.weight_files import check_regular, weight_bytes
from slimgpt.models.build import MODELING_FILE
from slimgpt.pruning.report import PruneReport, with_evaluation

IDENTITY = ("text", "window", "stride", "text_sha256", "tokens", "task", "num_fewshot", "metric")
"""What tells one measurement from another; of the same one the newer figures stay."""


def read_own_report(folder: Path | None, name: str) -> PruneReport:
    """The report of a slim folder.

    Raises:
        ModelError: it is no folder of ours, or its report or its card is damaged.
    """
    report = read_report(folder) if folder is not None else None
    if folder is None or report is None:
        raise ModelError(f"{name} has no {REPORT_FILE}, so its card is not one of ours; give a folder that prune wrote")
    read_card(folder)
    return PruneReport.from_json(report)


def read_card(folder: Path) -> str:
    """The card of a model folder; empty if it has none.

    Raises:
        ModelError: it is no file, or no text.
    """
    card = folder / CARD_FILE
    check_regular([card])
    try:
        return card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{card} cannot be read: {one_line(error)}; it must be text in UTF-8: correct it, or move it away"
        ) from error


def update_card(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Add figures to a slim folder's report and write its card anew; what it says of exports stays.

    Args:
        results: as :func:`slimgpt.evaluation.card_figures.text_figures` and ``task_figures`` give them.

    Raises:
        ModelError: the folder has no report of ours.
        OutputError: it cannot be written.
    """
    report = read_own_report(folder, str(folder))
    new = {_identity(result): result for result in results}
    kept = [result for result in report.evaluation.get("results", ()) if _identity(result) not in new]
    report = with_evaluation(report, results=[*kept, *new.values()])
    own_code = (folder / MODELING_FILE).is_file()
    text = model_card(report, weight_bytes(folder), own_code=own_code, origin=folder)
    card = folder / CARD_FILE
    _, heading, exports = read_card(folder).partition(f"\n{EXPORTS}\n")
    try:
        write_text(folder / REPORT_FILE, report_text(report))
        write_text(card, text + (heading + exports if heading else ""))
    except OSError as error:
        raise OutputError(f"cannot write the card of {folder}: {error}") from error


def _identity(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(key) for key in IDENTITY)
