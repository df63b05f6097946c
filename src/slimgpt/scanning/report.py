"""Report of a scan: a row for every size, and the largest one that loses little enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.config import PruneConfig
from slimgpt.scanning.plot import scan_figure
from slimgpt.scanning.points import Loss, ScanPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_KL = 0.25
"""Nats per token that may be lost where nothing is said: perplexity then grows by about a quarter (``e ** 0.25`` is
1.28)."""


MARKED = "* pruned and measured; the others are predicted; speed as FLOPs promise it"
"""What stands below a table."""


@dataclass(frozen=True, repr=False)
class ScanReport:
    """Losses and gains of every size of a model.

    Args:
        base_model: the dense model, as the user named it.
        settings: of the prunings; their ratio is the smallest that was pruned to.
        parameters: of the dense model.
        points: by size, the least removed first.
        text: the text that the recommendation goes by.
        max_kl: the largest KL divergence on it that is recommended, in nats per token.
        texts: what the losses were measured on: source, windows, tokens and digest, by name.
        calibration: what the prunings were calibrated on.
        prunings: of every size that was pruned to: the report's entries on the divergence and on measured costs, and
            the seconds.
        omitted: sizes that no widths can have, or from the first on that pruning gave NaN for, with the reason.
        seconds: of all.
    """

    base_model: str
    model_type: str
    settings: PruneConfig
    parameters: int
    points: tuple[ScanPoint, ...]
    text: str
    max_kl: float
    texts: dict[str, dict[str, Any]]
    calibration: dict[str, Any]
    prunings: tuple[dict[str, Any], ...]
    omitted: dict[str, str]
    versions: dict[str, str]
    seconds: float

    @property
    def recommended(self) -> ScanPoint | None:
        """The largest size up to which no KL divergence is above ``max_kl``; ``None`` where the first one's is."""
        best = None
        for point in self.points:
            if point.losses[self.text].kl > self.max_kl:
                break
            best = point
        return best

    @property
    def reason(self) -> str:
        """Why this size is recommended, or none, in a sentence."""
        best, text = self.recommended, FOR_PEOPLE[self.text]
        rule = f"the KL divergence on {text} may be at most {self.max_kl:g} nats per token"
        if best is None:
            first = self.points[0]
            return (
                f"{rule}, and {_percent(first)} removed has {first.losses[self.text].kl:.3f} already: more calibration "
                "text, training afterwards (slimgpt recover) or a larger --max-kl"
            )
        own = best.losses[self.text]
        rest = self.points[self.points.index(best) + 1 :]
        beyond = f"the next, {_percent(rest[0])}, has {rest[0].losses[self.text].kl:.3f}" if rest else "the largest"
        known = "measured" if best.measured else "predicted"
        return (
            f"{rule}; {_percent(best)} removed has {own.kl:.3f} ({known}), {beyond}. {own.same_top:.0%} of the most "
            f"likely next tokens stay the same, and FLOPs promise prompts {best.prefill:.2f} and new tokens "
            f"{best.decode:.2f} times as fast"
        )

    def __repr__(self) -> str:
        best = self.recommended
        most = "nothing" if best is None else _percent(best)
        return f"<{type(self).__name__} of {self.base_model}: {most} removed within {self.max_kl:g} nats per token>"

    def summary(self) -> str:
        """A line for every size, then the recommendation."""
        header, *rows = self.rows()
        widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (header, *rows)]
        return "\n".join([f"{self.base_model}: losses on {FOR_PEOPLE[self.text]}", *lines, MARKED, self.reason])

    def rows(self) -> list[list[str]]:
        """The table as text, its header first."""
        header = ["removed", "parameters", "KL, nats", "bits/byte", "same top", "prefill", "decode"]
        return [header, *(_row(point, point.losses[self.text]) for point in self.points)]

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        header, *rows = ([escape(cell) for cell in row] for row in self.rows())
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table><p>{MARKED}</p><p>{escape(self.reason)}</p>"

    def plot(self) -> Figure:
        """KL divergence, agreement and speed against the share removed, as a matplotlib figure."""
        best = self.recommended
        return scan_figure(self.points, FOR_PEOPLE, self.max_kl, None if best is None else best.ratio)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        best = self.recommended
        return {
            **asdict(self),
            "recommended": None if best is None else best.ratio,
            "reason": self.reason,
        }


def _percent(point: ScanPoint) -> str:
    return f"{100 * point.ratio:g}%"


def _row(point: ScanPoint, loss: Loss) -> list[str]:
    billions = point.parameters >= 1e9
    return [
        f"{'* ' if point.measured else ''}{_percent(point)}",
        f"{point.parameters / (1e9 if billions else 1e6):.2f}{'B' if billions else 'M'}",
        f"{loss.kl:.3f}",
        f"{loss.bits_per_byte:.3f}",
        f"{loss.same_top:.1%}",
        f"x {point.prefill:.2f}",
        f"x {point.decode:.2f}",
    ]
