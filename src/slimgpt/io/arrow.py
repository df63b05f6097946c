"""Files of Apache Arrow, whose library is of the extra ``hub``: it is larger than all else beside torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimgpt.errors import UsageError


def check_pyarrow(file: Path) -> None:
    """Refuse a file that cannot be read without pyarrow.

    Raises:
        UsageError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UsageError(f"{file} is read with pyarrow: pip install 'slimgpt[hub]', or write the rows as .jsonl")


def read_arrow(file: Path) -> list[dict[str, Any]]:
    """The rows of a file in Arrow's streaming format.

    Raises:
        UsageError: pyarrow is not installed.
    """
    check_pyarrow(file)
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()
