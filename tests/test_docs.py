"""Pages: links and named paths lead somewhere, titles are apart, and the glossary's names are in the code."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import typer

from slimgpt.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *DOCS.rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"\b(?:docs|benchmarks)/[\w./-]+\.(?:md|json|png|py)\b")
"""A file of the repository as text or code name it."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> Iterator[str]:
    """The lines of a page outside its blocks of code."""
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield line


def headings(page: Path) -> list[str]:
    return [line.lstrip("#").strip() for line in prose(page) if re.match(r"#{1,6} ", line)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    seen: Counter[str] = Counter()
    names = set()
    for heading in headings(page):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return names


def links(page: Path) -> list[str]:
    return [link for line in prose(page) for link in LINK.findall(line) if not re.match(r"\w+:", link)]


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@by_page
def test_every_link_leads_to_a_file_and_to_a_heading(page):
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# One `two`: three\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n\n[a](other.md#one-two-three) [b](other.md#again-1) [c](#here) [d](https://example.org)\n"
        "[e](none.md) [f](other.md#again-2) [g](#there)\n\n```\n# Not here\n[h](none.md)\n```\n\n[i](#not-here)\n"
    )
    assert dead_links(page) == ["none.md", "other.md#again-2", "#there", "#not-here"]


def script(name: str) -> ModuleType:
    """A script of ``docs``."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_code():
    for file, text in script("make_reference").pages().items():
        assert file.read_text(encoding="utf-8") == text, "run python docs/make_reference.py"


def test_the_site_builds_without_a_dead_link(tmp_path):
    script("build_site").build(tmp_path / "site")
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "docs/guides/serving.html" in home
    assert (tmp_path / "site/benchmarks/results/quality-ratio.png").is_file()


def test_messages_on_the_page_are_those_of_the_code():
    code = "".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")
    )
    rows = [line for line in prose(DOCS / "guides/troubleshooting.md") if line.startswith("| `")]
    messages = [part for row in rows for part in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 15
    assert [message for message in messages if message not in code] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The words of every `slimgpt` command in the blocks of code of a page; what is a place for something stays."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True) if "slimgpt " in command and "'" not in command else []
                if "slimgpt" in words and words.index("slimgpt") in (0, words.index("-m") + 1 if "-m" in words else 0):
                    yield words[words.index("slimgpt") + 1 :]


@by_page
def test_commands_on_pages_have_the_options_that_they_name(page):
    if page.name in ("lab-notes.md", "python.md"):
        pytest.skip("what was true once, and signatures")
    root = typer.main.get_command(app)
    for words in shell_commands(page):
        if not words or words[0].startswith(("-", "...", "RECIPE")):
            continue
        command = root
        while words and getattr(command, "commands", None):
            assert words[0] in command.commands, f"slimgpt has no command {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        assert [w for w in words if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known] == []


@by_page
def test_files_that_a_page_names_are_there(page):
    assert [name for line in prose(page) for name in PATH.findall(line) if not (ROOT / name).is_file()] == []


def test_pages_that_the_code_names_are_there():
    named = {
        name
        for folder in ("src", "tests")
        for file in (ROOT / folder).rglob("*.py")
        if file != Path(__file__)
        for name in PATH.findall(file.read_text(encoding="utf-8"))
        if name.endswith(".md")
    }
    assert "docs/adding-a-family.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_no_two_pages_have_one_title():
    titles = Counter(headings(page)[0] for page in PAGES)
    assert [title for title, count in titles.items() if count > 1] == []


def test_the_index_has_every_page():
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "index.md")}
    assert [page for page in PAGES if page != DOCS / "index.md" and page not in listed] == []


def terms() -> list[tuple[str, str, str]]:
    """The rows of the glossary: term, sentence, names in the code."""
    rows = [line for line in prose(DOCS / "glossary.md") if line.startswith("| ")]
    split = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in rows]
    return [row for row in split if row[0] != "term"]  # type: ignore[misc]


def find(name: str) -> object:
    """What a dotted name stands for: a module, or an attribute of one, or an attribute of that.

    Raises:
        AttributeError: there is no such thing.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(
                value, "__dataclass_fields__", {}
            )  # those without a default are no attributes of the class
            value = fields[part] if part in fields else getattr(value, part)
        return value
    raise AttributeError(name)


def test_names_in_the_glossary_are_in_the_code():
    missing = []
    for term, _, names in terms():
        dotted = re.findall(r"`(slimgpt\.[\w.]+)`", names)
        assert dotted or "`" in names, f"{term} has no name in the code"
        for name in dotted:
            try:
                find(name)
            except AttributeError:
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("name", ["slimgpt.nothing", "slimgpt.planning.Plan.nothing"])
def test_a_name_that_is_gone_is_seen(name):
    with pytest.raises(AttributeError, match="nothing"):
        find(name)


def test_the_glossary_is_in_order_and_has_each_term_once():
    words = [term.lower() for term, _, _ in terms()]
    assert words == sorted(set(words))
    assert len(words) >= 40
    for _, sentence, _ in terms():
        assert sentence.endswith(".")
