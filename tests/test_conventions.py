"""What CONTRIBUTING.md asks of the code and its tests, held by reading them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

FILLERS = frozenset(
    (
        *("found", "said", "told", "got", "there", "here", "it", "they", "them", "this", "that", "these", "those"),
        *("what", "which", "some", "everything", "thing", "things", "stuff"),
    )
)
"""Names that do not say what they hold."""


def names_given(source: str) -> Iterator[tuple[int, str]]:
    """Every name that a file gives to a variable, an argument, a function or a class, with its line.

    Fields of classes are left out: some are keys of reports.
    """
    tree = ast.parse(source)
    fields = {
        statement.target
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in fields:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or (
            isinstance(node, ast.ExceptHandler) and node.name
        ):
            yield node.lineno, str(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


def test_a_name_says_what_it_holds():
    """`report`, `windows`, `logits`, ... in place of `found`, `said`, `there`."""
    fillers = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for folder in ("src", "tests", "benchmarks", "examples")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, name in names_given(file.read_text(encoding="utf-8"))
        if name in FILLERS
    ]
    assert fillers == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("found = 1", ["found"]),
        ("a, (found, b) = c", ["a", "b", "found"]),
        ("if (said := f()): pass", ["said"]),
        ("for it in a: pass", ["it"]),
        ("with a as it: pass", ["it"]),
        ("[there for there in a]", ["there"]),
        ("f(lambda *said: said)", ["said"]),
        ("def f(what): pass", ["f", "what"]),
        ("import numpy as it", ["it"]),
        ("try: pass\nexcept E as it: pass", ["it"]),
        ("class A:\n    found: int = 1", ["A"]),
        ("f(found=1); a.found = 2; print(found)", []),
    ],
)
def test_names_that_are_given_are_seen(source, names):
    assert sorted(name for _, name in names_given(source)) == sorted(names)


def imported_from_us(tree: ast.Module) -> set[str]:
    """The names that a file imports from slimgpt."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names if "slimgpt" in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "slimgpt":
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def patched_constants(source: str) -> Iterator[str]:
    """Constants of slimgpt's modules that a file replaces by `setattr`, by a dotted string or on the module."""
    tree = ast.parse(source)
    ours = imported_from_us(tree)
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "setattr"):
            continue
        target, *rest = call.args
        if isinstance(target, ast.Constant) and str(target.value).startswith("slimgpt."):
            name = str(target.value).rpartition(".")[2]
        elif ast.unparse(target).partition(".")[0] in ours and rest and isinstance(rest[0], ast.Constant):
            name = str(rest[0].value)
        else:
            continue
        if name.isupper():
            yield name


CLAUSES = ("What ", "Whose ", "Where ", "Which ", "Whatever ", "How ", "Who ")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings of a file, of its classes and functions, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def test_a_docstring_names_its_thing():
    """A noun first, and no clause. The help of commands says what a command does in words of its own."""
    clauses = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in sorted((ROOT / "src").rglob("*.py"))
        if file.parent.name != "cli"
        for line, text in docstrings(file.read_text(encoding="utf-8"))
        if text.startswith(CLAUSES)
    ]
    assert clauses == []


def test_docstrings_are_seen():
    source = '"""A."""\nclass B:\n    """What."""\n    def c(self):\n        """D."""\n'
    assert sorted(docstrings(source)) == [(1, "A."), (3, "What."), (5, "D.")]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_thresholds_are_set_and_not_patched(file):
    """`other_thresholds(name=value)`, or an argument, in place of a patched constant."""
    assert list(patched_constants(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('m.setattr("slimgpt.calibration.windows.TEMPLATE_SECONDS", 1)', ["TEMPLATE_SECONDS"]),
        ('m.setattr(module, "CPU_CHUNK", 1)', ["CPU_CHUNK"]),
        ('m.setattr(slimgpt.losses.chunked, "CPU_CHUNK", 1)', ["CPU_CHUNK"]),
        ('m.setattr("slimgpt.recovery.run.save", None)', []),
        ('m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)', []),
        ('m.setattr(torch, "INT8", 1)', []),
    ],
)
def test_patched_constants_are_seen(line, names):
    assert (
        list(patched_constants(f"import slimgpt, torch\nfrom slimgpt.losses import chunked as module\n{line}")) == names
    )


def test_no_function_takes_more_than_seven_positions():
    """The rest is given by name, in commands too."""
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for file in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and len(node.args.posonlyargs) + len(node.args.args) > 7
    ]
    assert long == []


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / "src").rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > 350} == {}
