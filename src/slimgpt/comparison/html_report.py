"""HTML report of a comparison: one self-contained file, with a light and a dark scheme and a mobile layout."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimgpt.comparison.plots import figures
from slimgpt.comparison.protocols import in_words, protocols
from slimgpt.io.plotting import COLORS, DARK_COLORS

if TYPE_CHECKING:
    from slimgpt.comparison.model_result import ModelResult
    from slimgpt.comparison.result import Comparison
    from slimgpt.comparison.row import ComparisonRow

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --page: #ffffff; --card: #f6f8fa;
  --good: #1a7f37; --bad: #b42318; --note: #9a6700; %(light)s }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --page: #0d1117;
  --card: #161b22; --good: #4ac26b; --bad: #ff7b72; --note: #e3b341; %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 26rem; max-width: 30.5rem; min-width: 0; margin: 0;
  padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow-x: auto; }
figure svg { display: block; width: 100%%; min-width: 18rem; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td:first-child { white-space: normal; min-width: 9rem; }
thead th { border-bottom: 2px solid var(--line); background: var(--card) !important; cursor: default; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--line); }
tr.group th { text-align: left; background: var(--card); font-size: .8rem; letter-spacing: .03em; color: var(--soft); }
thead th small { white-space: normal; font-weight: normal; }
/* On a phone the slim models stand beside the names of the rows, and the base behind them. */
@media (max-width: 40rem) { tr { display: flex; }
  th, td { flex: 0 0 6.6rem; padding: .35rem .4rem; white-space: normal; overflow-wrap: anywhere; }
  th:first-child, td:first-child { flex: 0 0 8rem; min-width: 0; z-index: 1; }
  tr.group th { flex: 1 0 100%%; } .base { order: 1; flex-grow: 1; } }
small { display: block; color: var(--soft); font-size: .78rem; }
small.good { color: var(--good); } small.bad { color: var(--bad); }
small.note { color: var(--note); white-space: normal; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  font-size: .78rem; }
pre.copy { user-select: all; }
summary { cursor: pointer; white-space: pre-wrap; }
.samples { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0 1rem; }
.samples dt { flex: 0 0 100%%; font-size: .8rem; color: var(--soft); }
.samples dd { flex: 1 1 100%%; margin: 0; padding: .5rem .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_BASE = ' class="base"'
"""Of the cells of the base."""


def write_page(comparison: Comparison, file: Path) -> None:
    """Write the report."""
    names = [result.name for result in comparison.sides]
    variables = {
        "light": " ".join(f"--c{i}: {color};" for i, color in enumerate(COLORS)),
        "dark": " ".join(f"--c{i}: {color};" for i, color in enumerate(DARK_COLORS)),
    }
    details = json.dumps(protocols(comparison), indent=1)
    body = [
        f"<h1>{_escape(names[0])} and its slim versions</h1>",
        f"<p>{_escape(_summary(comparison))}</p>",
        '<h2>Plots</h2>\n<div class="plots">',
        *(f"<figure>{_svg(figure)}</figure>" for figure in figures(comparison)),
        "</div>",
        "<h2>All figures</h2>",
        f'<div class="scroll">{_table(comparison, names)}</div>',
        *_repeated(comparison),
        "<p>Below a slim model's value: its ratio to the first column (of scores in per cent), and the difference with "
        "its standard error on the same questions or tokens. Grey: the difference is within 1.96 standard errors, or "
        "there were fewer than 20 questions, so it may be chance.</p>",
        "<details><summary>the table as Markdown (a click selects all of it)</summary>"
        f'<pre class="copy">{_escape(comparison.markdown())}</pre></details>',
        *_samples(comparison),
        *_commands(comparison),
        "<h2>How the figures were measured</h2>",
        *(f"<p>{_escape(sentence)}</p>" for sentence in in_words(comparison)),
        f"<details><summary>protocols</summary><pre>{_escape(details)}</pre></details>",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(names[0])}: dense and slim</title>\n<style>{_STYLE % variables}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    file.write_text(page, encoding="utf-8")


def _repeated(comparison: Comparison) -> list[str]:
    """The line under values that are means."""
    if not any(side.repeats for side in comparison.sides):
        return []
    return [
        "<p>Values are means over runs (seeds, or several models in one column). SD: standard deviation over the runs; "
        "SE of one: the standard error that a single run has by its questions or tokens. Of scores and shares both are "
        "in percentage points.</p>"
    ]


def _summary(comparison: Comparison) -> str:
    """One clause per slim model: its size, its first perplexity and, if it was timed, its decoding speed, relative to
    the base."""
    base, parts = comparison.sides[0], []
    timings, batches = comparison.timings, comparison.wanted.batches
    decode = [row.decode for row in timings.rows if row.batch == batches[0]] if timings else []

    def first(run: ModelResult) -> float:
        return run.perplexities[0][1].perplexity

    for index, result in enumerate(comparison.sides[1:], 1):
        part = f"{result.name}: {result.mean(lambda run: run.parameters) / base.parameters:.0%} of the parameters"
        if base.perplexities:
            text = Path(base.perplexities[0][0]).name
            part += f", perplexity {base.mean(first):.2f} → {result.mean(first):.2f} on {text}"
        parts.append(part + (f", decodes {decode[index] / decode[0]:.2f} times as fast" if decode else ""))
    return "; ".join(parts) + "."


def _table(comparison: Comparison, names: list[str]) -> str:
    lines = [
        "<table>",
        "<thead><tr><th></th>" + "".join(_heading(*each) for each in enumerate(comparison.sides)) + "</tr></thead>",
    ]
    group = None
    lines.append("<tbody>")
    for row in comparison.table():
        if row.group != group:
            group = row.group
            lines.append(f'<tr class="group"><th colspan="{len(names) + 1}">{_escape(group)}</th></tr>')
        note = f'<small class="note">{_escape(row.note)}</small>' if row.note else ""
        # The first column is the base's; a phone shows it last.
        cells = "".join(
            f"<td{_BASE if i == 0 else ''}>{_escape(row.text(i))}{_spread(row, i)}{_change(row, i)}</td>"
            for i in range(len(names))
        )
        lines.append(f"<tr><td>{_escape(row.name)}{note}</td>{cells}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>"])


def _heading(index: int, side: ModelResult) -> str:
    """A model's name, and how it was made as far as its report says; a GGUF file has none."""
    made = [side.method] if side.method else []
    made += [f"{side.mean(lambda run: run.removed or 0.0):.1%} removed"] if side.removed is not None else []
    made += [f"on {side.calibration}"] if side.calibration else []
    made += ["dense"] if not made and index == 0 else []
    line = f"<small>{_escape(', '.join(made))}</small>" if made else ""
    return f"<th{_BASE if index == 0 else ''}>{_escape(side.name)}{line}</th>"


def _spread(row: ComparisonRow, index: int) -> str:
    text = row.spread_text(index)
    return f"<small>{_escape(text)}</small>" if text else ""


def _change(row: ComparisonRow, index: int) -> str:
    text = row.change_text(index)
    return f'<small class="{row.verdict(index)}">{_escape(text)}</small>' if text else ""


def _samples(comparison: Comparison) -> list[str]:
    """The texts that the models wrote, by prompt."""
    sides = comparison.sides
    lines = ["<h2>What they write</h2>"] if any(side.samples for side in sides) else []
    for index in range(max(len(side.samples) for side in sides)):
        lines.append(f'<details open><summary>{_escape(sides[0].samples[index].prompt)}</summary><dl class="samples">')
        for side in sides:
            sample = side.samples[index]
            text = "no room for an answer in its context" if sample.text is None else sample.text
            # Where the prompts differ, one of two models has no chat template.
            prompt = "" if sample.prompt == sides[0].samples[index].prompt else f": {sample.prompt}"
            end = "" if sample.stopped or sample.text is None else '<small class="note">cut off here</small>'
            lines.append(f"<dt>{_escape(side.name + prompt)}</dt><dd>{_escape(text)}{end}</dd>")
        lines.append("</dl></details>")
    return lines


def _commands(comparison: Comparison) -> list[str]:
    """The commands that made the models, where they have a report."""
    made = [side for side in comparison.sides if side.commands]
    lines = ["<h2>How they were made</h2>"] if made else []
    for side in made:
        text = "\n\n".join(side.commands)
        lines.append(f"<details><summary>{_escape(side.name)}</summary><pre>{_escape(text)}</pre></details>")
    return lines


def _svg(figure: Any) -> str:
    """A figure as SVG; its text and lines use the colours of the page's scheme."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.patch.set_alpha(0)
        for axis in figure.axes:
            axis.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"#000000|#262626|black", "currentColor", text)
    text = re.sub(r"(<text\b[^>]*style=\")", r"\1fill: currentColor; ", text)
    text = re.sub(r"font: ([^;\"]*?)'[^\"]*?(?=[;\"])", r"font: \1system-ui, sans-serif", text)
    for index, color in enumerate(COLORS):
        text = text.replace(color, f"var(--c{index})")
    return text


def _escape(text: str) -> str:
    return html.escape(str(text))
