"""Write the pictures of the terminal and of the page of a comparison into ``docs/pictures``.

    python docs/make_screenshots.py WORK

WORK is a folder for the models, about 0.5 GB; what an earlier call left there is used again. Needs a checkout with its
development packages, Chromium, and some minutes: SmolLM2-135M-Instruct is pruned and compared with itself, on so
little text that the figures say nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cli.terminal import CONTROL, MARK, raw_output, screens  # noqa: E402
from tests.comparison.browser import CHROMIUM, browser  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
COLUMNS = 80
COLOURS = 128
"""Of a picture of a page: enough for text and plots, in a quarter of the bytes."""

PAGES = (
    # Width in CSS pixels, scheme, what is at the top, height.
    ("compare-light", 1000, "light", None, 1250),
    ("compare-dark", 1000, "dark", None, 560),
    ("compare-phone", 390, "light", "table", 780),
)

SMALL = ("--num-samples", "32", "--seq-len", "256")
RUNS = {
    "slim-20": ("prune", "demo", "slim-20", "--ratio", "0.2", *SMALL),
    "page": (
        "compare", "demo", "slim-20", "--window", "128", "--max-tokens", "640", "--samples", "1", "--no-speed",
        "--out", "page",
    ),
}  # fmt: skip


def run(work: Path, name: str) -> str:
    """What a command wrote to a terminal of 80 columns; kept in WORK."""
    kept = work / f"{name}.terminal"
    if not kept.is_file():
        shutil.rmtree(work / name, ignore_errors=True)
        kept.write_text(raw_output([RUNS[name]], COLUMNS, work), encoding="utf-8", newline="")
    with kept.open(encoding="utf-8", newline="") as file:
        return file.read().partition(MARK)[2].lstrip("\r\n").replace(f"{work}/", "")


def until(output: str, shown: str) -> list[str]:
    """The screen when a bar first showed something.

    Raises:
        ValueError: it never did.
    """
    for lines in screens(output):
        if any(re.search(shown, CONTROL.sub("", line)) for line in lines):
            return list(lines)
    raise ValueError(f"{shown} was never shown")


def last(output: str) -> list[str]:
    """The screen at the end."""
    *_, lines = screens(output)
    return list(lines)


def picture_of_terminal(file: Path, command: Sequence[str], lines: Sequence[str]) -> None:
    """Write lines of a terminal as an SVG that asks no server for its letters."""
    while lines and not CONTROL.sub("", lines[-1]).strip():
        lines = lines[:-1]
    with (Path(tempfile.gettempdir()) / "nowhere").open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi("\n".join(["$ slimgpt " + " ".join(command), *lines])))
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = console.export_svg(title="slimgpt", code_format=form, unique_id=file.stem)
    file.write_text(svg.replace("Fira Code", "ui-monospace"), encoding="utf-8")


def pictures_of_page(page: Path, work: Path) -> None:
    """Write the page of a comparison as PNGs: light, dark and on a phone."""
    with tempfile.TemporaryDirectory(dir=work) as folder, browser(Path(folder) / "profile") as view:
        for name, width, scheme, top, height in PAGES:
            view.open(page, width, scheme)
            offset = view.evaluate(f"document.querySelector('{top}').getBoundingClientRect().top") - 60 if top else 0
            shot = Path(folder) / "shot.png"
            view.picture(shot, height, round(offset))
            picture = Image.open(shot).convert("RGB")
            small = picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            small.save(PICTURES / f"{name}.png", optimize=True)


def main(work: Path) -> None:
    """Write all pictures."""
    if CHROMIUM is None:
        sys.exit("no Chromium was found on the PATH")
    work.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    output = {name: run(work, name) for name in RUNS}
    prune = RUNS["slim-20"]
    picture_of_terminal(PICTURES / "prune-running.svg", prune, until(output["slim-20"], r"layer 12/30"))
    picture_of_terminal(PICTURES / "prune-done.svg", prune, last(output["slim-20"]))
    pictures_of_page(work / "page" / "report.html", work)
    subprocess.run(["ls", "-l", str(PICTURES)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve())
