"""Programs that a model wrote, each run against its tests in a process of its own.

The metric that tasks of lm-evaluation-harness take from the hub under the name ``code_eval``, without the hub and
without code that is fetched from there. The processes are no sandbox: what they run may do whatever this user may.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import evaluate

from slimgpt.errors import UsageError

ALLOWED = "HF_ALLOW_CODE_EVAL"
"""The variable of the environment that must be ``1``: that of the hub's metric."""

TIMEOUT = 3.0
"""Seconds that a program and its tests may take: what the hub's metric gives them."""

STARTING = 20.0
"""Seconds more after which its process is ended from outside: an interpreter starts slowly on a busy machine."""

MEMORY = 4 << 30
"""Bytes that a program may take."""

PASSED = 77
"""Exit code of a process whose program came to its end; a program that exits before has another."""

_RUN = f"""
import os, sys
def stop(*_):
    raise TimeoutError
try:
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
except (ImportError, ValueError, OSError):
    pass  # no such limits here: the parent process has one of time
with open(sys.argv[1], encoding="utf-8") as file:
    source = file.read()
try:
    exec(compile(source, "program", "exec"), {{"__name__": "program"}})
except BaseException:
    os._exit(1)
os._exit({PASSED})
"""


class CodeEval:
    """The metric ``code_eval``: the share of problems that one of ``k`` programs solves."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = TIMEOUT,
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Run every program of every problem.

        Args:
            references: the tests of each problem.
            predictions: the programs of each problem.
            k: numbers of programs; left out are those above what a problem has.
            num_workers: processes at once.
            timeout: seconds for a program and its tests.

        Returns:
            ``pass@k`` by name, and by problem which of its programs passed.

        Raises:
            UsageError: code may not be run.
        """
        if os.environ.get(ALLOWED) != "1":
            raise UsageError("code that a model writes is run with --confirm-run-unsafe-code only")
        jobs = [f"{program}\n{tests}" for tests, programs in zip(references, predictions) for program in programs]
        with ThreadPoolExecutor(min(num_workers, os.cpu_count() or 1)) as pool:
            outcomes = iter(list(pool.map(lambda source: passes(source, timeout), jobs)))
        passed = {number: [next(outcomes) for _ in programs] for number, programs in enumerate(predictions)}
        counts = [(len(each), sum(each)) for each in passed.values()]
        shares = {
            f"pass@{size}": sum(pass_at_k(total, right, size) for total, right in counts) / len(counts)
            for size in k
            if counts and all(total >= size for total, _ in counts)
        }
        return shares, passed


def pass_at_k(total: int, right: int, k: int) -> float:
    """The chance that one of ``k`` of ``total`` programs, drawn without replacement, is among the ``right`` ones (Chen
    et al., arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def passes(source: str, timeout: float = TIMEOUT) -> bool:
    """Whether a program comes to its end in time, in an empty folder, without input and without this environment."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = os.path.join(folder, "program.py")
        with open(file, "w", encoding="utf-8", errors="surrogatepass") as opened:
            opened.write(source)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUN, file, str(timeout)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=kept,
            start_new_session=True,
        )
        try:
            return process.wait(timeout + STARTING) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    if hasattr(os, "killpg"):
        import signal

        with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


@contextmanager
def local_code_eval() -> Iterator[None]:
    """While this lasts, ``evaluate.load("code_eval")`` gives :class:`CodeEval`."""
    load = evaluate.load

    def loaded(path: str, *arguments: Any, **named: Any) -> Any:
        return CodeEval() if path == "code_eval" else load(path, *arguments, **named)

    with mock.patch.object(evaluate, "load", loaded):
        yield
