"""Build the site into ``site/`` from README, docs and results, without a network: ``python docs/build_site.py``.

Pages keep their places beside each other, so that links that work in the repository work there, too. A link that leads
nowhere ends the build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
FILE = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def titled(*names: str) -> list[str]:
    """Pages of ``docs``."""
    return [f"docs/{name}.md" for name in names]


def navigation() -> list[dict[str, object]]:
    """The pages by chapter; guides, concepts and results are all that are there."""
    pages = {
        "Guides": sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs/guides").glob("*.md")),
        "Concepts": titled("concepts/how-it-works", "glossary", "adding-a-family"),
        "Reference": titled("families", "reference/commands", "reference/python"),
        "Results": sorted(str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks/results").glob("*.md")),
        "Project": ["CHANGELOG.md", "CONTRIBUTING.md", *titled("lab-notes")],
    }
    first: list[dict[str, object]] = [
        {"Home": "README.md"},
        {"Quick start": "docs/quick-start.md"},
        {"All pages": "docs/index.md"},
    ]
    return [*first, *({name: list_} for name, list_ in pages.items())]


def stage(folder: Path) -> None:
    """Copy all pages, and whatever else they link to."""
    pages = [*(ROOT / name for name in TOP), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    linked = {
        (page.parent / link).resolve()
        for page in pages
        for link in FILE.findall(page.read_text(encoding="utf-8"))
        if not re.match(r"\w+:", link)
    }
    for file in {*pages, *linked}:
        if file.is_file():
            target = folder / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def build(site: Path = SITE) -> None:
    """Build the site.

    Raises:
        subprocess.CalledProcessError: a link leads nowhere, or a page is in no chapter.
    """
    with tempfile.TemporaryDirectory() as work:
        pages = Path(work) / "pages"
        stage(pages)
        config = {
            "site_name": "SlimGPT",
            "docs_dir": str(pages),
            "site_dir": str(site),
            "theme": {"name": "readthedocs", "highlightjs": False},
            "nav": navigation(),
            "not_in_nav": "benchmarks/floor.md",
            "validation": {"links": {"anchors": "warn", "unrecognized_links": "warn"}, "omitted_files": "warn"},
            "use_directory_urls": False,
        }
        (Path(work) / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(Path(work) / "mkdocs.yml")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    build()
    sys.stdout.write(f"wrote {SITE}\n")
