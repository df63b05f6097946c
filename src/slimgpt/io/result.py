"""Results of measurements as a notebook and a prompt show them: one line, a summary, a table."""

from __future__ import annotations

from dataclasses import fields
from html import escape
from pathlib import Path


class Result:
    """A base for dataclasses (``repr=False``) of many values: those that are one number or name are shown."""

    def _facts(self) -> list[tuple[str, str]]:
        """Names and values of fields that are one number or name, and how long tuples are."""
        facts = []
        for entry in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, entry.name)
            if isinstance(value, float):
                facts.append((entry.name, f"{value:.6g}"))
            elif isinstance(value, (str, int, Path)) and value != "":
                facts.append((entry.name, str(value)))
            elif isinstance(value, tuple) and value:
                facts.append((entry.name, str(len(value))))
        return facts

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(f'{name} {value}' for name, value in self._facts())}>"

    def summary(self) -> str:
        """The values that are one number or name, a line each; :meth:`to_json` has all."""
        facts = self._facts()
        width = max((len(name) for name, _ in facts), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts())
        return f"<table>{''.join(rows)}</table>"
