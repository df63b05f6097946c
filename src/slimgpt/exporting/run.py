"""`slimgpt export`: check, write under a working name, verify, publish."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from slimgpt.checkpoint.card import EXPORTS
from slimgpt.checkpoint.card_metadata import CARD_FILE
from slimgpt.checkpoint.hub import check_repository
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.checkpoint.updating import read_card
from slimgpt.errors import ExportError, ModelError, OutputError, PlanError, one_line
from slimgpt.exporting import gguf, hf_folder, nemotron, onnx, openvino, padded
from slimgpt.exporting.source import ExportSource, open_folder
from slimgpt.exporting.verification import Verification, engine_problem, verify
from slimgpt.io.atomic import write_text
from slimgpt.io.folders import check_name, check_output, check_writable, new_folder, output_lock
from slimgpt.io.result import Result
from slimgpt.models.architecture import Sizes, is_uniform
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.engines import gguf_architecture, graph_problem, nemotron_problem
from slimgpt.planning.stock_forms import padded_problem, stock_forms


@dataclass(frozen=True)
class Format:
    """A form that a model can be exported to.

    Args:
        check: refuses what the form cannot hold, from config and headers alone.
        write: writes into a folder, or a file where ``single`` is set; returns notes for the user.
        problem: why a model of a config and widths cannot take the form; ``None`` if it can. For plans.
    """

    check: Callable[[ExportSource], None]
    write: Callable[[ExportSource, Path], list[str]]
    problem: Callable[[PreTrainedConfig, Sequence[Sizes]], str | None]
    single: bool = False


def _gguf_problem(config: PreTrainedConfig, layers: Sequence[Sizes]) -> str | None:
    try:
        gguf_architecture(config, layers)
    except PlanError as error:
        return str(error)
    return None


def _uniform_problem(config: PreTrainedConfig, layers: Sequence[Sizes]) -> str | None:
    if is_uniform(layers):
        return None if stock_config(config, layers[0]) is not None else "no stock class takes these widths"
    ways = stock_forms(config, layers, "pruning with --uniform", "--to padded")
    return f"layers of different widths need {ways}" if ways else "its layers differ in width"


def _gguf(quantize: str, pre: str | None) -> Format:
    return Format(
        lambda exported: gguf.check(exported, quantize),
        lambda exported, file: gguf.write(exported, file, quantize, pre),
        _gguf_problem,
        single=True,
    )


FORMATS: dict[str, Format] = {
    "gguf": _gguf("F16", None),
    "hf-uniform": Format(hf_folder.check_uniform, hf_folder.write_uniform, _uniform_problem),
    "padded": Format(padded.check, padded.write, padded_problem),
    "nemotron-nas": Format(nemotron.check_nemotron, nemotron.write_nemotron, nemotron_problem),
    "onnx": Format(onnx.check_onnx, onnx.write_onnx, lambda config, _: graph_problem(config)),
    "openvino": Format(openvino.check_openvino, openvino.write_openvino, lambda config, _: graph_problem(config)),
}
"""By the names that ``--to`` takes."""


@dataclass(frozen=True, repr=False)
class ExportReport(Result):
    """Result of an export: the file or folder, and its comparison with the slim model.

    Args:
        path: the folder or file.
        bytes: of all of it.
        notes: what the user should know.
        verification: the comparison; ``None`` if none was made.
        unverified: why none was made.
    """

    path: Path
    to: str
    bytes: int
    notes: tuple[str, ...]
    verification: Verification | None
    unverified: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": self.path.name}


def check_format(to: str, config: PreTrainedConfig, layers: Sequence[Sizes]) -> None:
    """Refuse a form before a model of these widths has been made.

    Raises:
        ExportError: an unknown form, or one that cannot hold the model.
    """
    problem = _format(to).problem(config, layers)
    if problem is not None:
        raise ExportError(f"these widths cannot become {to}: {problem}")


def export(
    slim: str | Path,
    out: str | Path,
    to: str,
    *,
    quantize: str | None = None,
    tokenizer_pre: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    on_written: Callable[[int, int], None] | None = None,
    on_compared: Callable[[int, int], None] | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> ExportReport:
    """Write a model folder in another form.

    Args:
        slim: a folder that `slimgpt prune` or ``save_pretrained`` wrote.
        out: the folder to write, or the ``.gguf`` file.
        to: a key of :data:`FORMATS`.
        quantize: for GGUF: ``F32``, ``F16`` (if not given), ``BF16``, ``Q8_0``, or a type of llama.cpp's quantiser.
        tokenizer_pre: for GGUF: llama.cpp's name of how the tokenizer splits text, where it cannot be told.
        overwrite: replace what is there.
        check: compare with the slim model in the real engine, where it is installed.
        on_written: called after every part that is written, a tensor or a layer, with parts done and in all; not for
            ONNX and OpenVINO, whose converters tell nothing.
        on_compared: called after every window and continuation that is compared, with those done and in all.
        push_to_hub: a repository of the hub, such as ``me/slim``, that the result is uploaded to once it is written and
            compared; token and name are checked first. With ``overwrite``, files that are there give way: all for a
            folder, the one of the same name for a GGUF file.
        private: a new repository is seen by its owner only.

    Raises:
        ExportError: the form cannot hold the model; it names one that can.
        VerificationError: what was written computes something else. Nothing is left.
        OutputError: the target exists or its disk is full. Nothing half-written is left.
    """
    form = _gguf((quantize or "F16").upper(), tokenizer_pre) if to == "gguf" else _format(to)
    if to != "gguf" and (quantize or tokenizer_pre):
        raise ExportError(f"quantize and tokenizer_pre are for GGUF files, and {to} is none; leave them out")
    path = Path(out).expanduser().absolute()
    check_target(to, path, overwrite, [Path(slim).expanduser()])
    exported = open_folder(slim, on_written)
    form.check(exported)
    file = path.name if form.single else None
    repository = check_repository(push_to_hub, private=private, overwrite=overwrite, file=file)
    comparisons: list[Verification] = []

    def compare(work: Path) -> str:
        """Compare under the working name; returns why it was not done."""
        problem = engine_problem(work) if check else "not asked for"
        if problem is None:
            comparisons.append(verify(work, slim, progress=on_compared))
            comparisons[0].check(path)
        return problem or ""

    write = _write_file if form.single else _write_folder
    notes, unverified = write(form, exported, path, overwrite, compare)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    report = ExportReport(path, to, size, tuple(notes), comparisons[0] if comparisons else None, unverified)
    try:
        record(report, exported.folder)
    except (ModelError, OSError) as error:  # the export is finished
        note = f"the card of {exported.folder} does not name this export: {one_line(error)}"
        report = replace(report, notes=(*report.notes, note))
    if repository is not None:
        repository.upload(path)
    return report


def record(report: ExportReport, slim: Path) -> None:
    """Add a line on the export to the slim folder's model card, in place of an older one of the same name; an exported
    folder gets a copy of the card. The card of a folder that is none of ours stays as it is."""
    text = read_card(slim)
    if not text:
        return
    start = f"- `{report.path.name}` ({report.to}"
    lines = [line for line in text.rstrip().splitlines() if not line.startswith(start)]
    if EXPORTS not in lines:
        lines += ["", EXPORTS, ""]
    result = report.verification
    if result is None:
        verdict = f"not verified: {report.unverified}"
    else:
        bits = "equal to the bit" if result.identical else f"at most {result.largest:.2g} apart"
        verdict = (
            f"{result.engine}: perplexity {result.perplexity:.4f} against {result.reference:.4f} of this folder on "
            f"{result.tokens:,} tokens, logits {bits}, {result.continuations[0]} of {result.continuations[1]} greedy "
            "continuations the same"
        )
    text = "\n".join([*lines, f"{start}, {report.bytes:,} bytes): {verdict}", ""])
    if report.path.is_dir():
        write_text(report.path / CARD_FILE, text)
    if (slim / REPORT_FILE).is_file():
        write_text(slim / CARD_FILE, text)


def _format(to: str) -> Format:
    if to not in FORMATS:
        raise ExportError(f"format '{to}' is unknown; choose {', '.join(FORMATS)}")
    return FORMATS[to]


def check_target(to: str, path: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse the folder, or the GGUF file, of an export before the work that would fill it.

    Args:
        inputs: folders that are read, which are never replaced.

    Raises:
        ExportError: an unknown form.
        OutputError: what :func:`slimgpt.io.folders.check_output` refuses.
    """
    if _format(to).single:
        _check_file(path, overwrite)
    elif path.suffix == ".gguf":
        raise OutputError(f"{path} is the name of a GGUF file, and a folder will be written; give another name")
    else:
        check_output(path, overwrite, inputs=inputs)


def _check_file(path: Path, overwrite: bool) -> None:
    if path.suffix != ".gguf":
        raise OutputError(f"{path} does not end in .gguf; give the name of the file to write")
    if path.parent.is_dir():
        check_name(path)
    if path.is_symlink():
        raise OutputError(f"{path} is a symbolic link; give the file itself, or another name")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give another name, or pass --overwrite to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write into {path.parent}; give a folder that is there and that you may write to")
    check_writable(path.parent)


def _write_file(
    form: Format, exported: ExportSource, path: Path, overwrite: bool, compare: Callable[[Path], str]
) -> tuple[list[str], str]:
    _check_file(path, overwrite)
    draft = path.parent / f".{path.stem}.partial.gguf"  # llama.cpp goes by the ending
    try:
        with output_lock(path):
            notes = form.write(exported, draft)
        with draft.open("rb") as handle:
            os.fsync(handle.fileno())
        unverified = compare(draft)
        draft.rename(path)
        return notes, unverified
    except OSError as error:
        raise OutputError(f"writing {path} failed, nothing was left there: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _write_folder(
    form: Format, exported: ExportSource, path: Path, overwrite: bool, compare: Callable[[Path], str]
) -> tuple[list[str], str]:
    try:
        with new_folder(path, overwrite) as work:
            notes = form.write(exported, work)
            if (exported.folder / REPORT_FILE).is_file():  # the record of how the slim model was made goes with it
                shutil.copyfile(exported.folder / REPORT_FILE, work / REPORT_FILE)
            unverified = compare(work)
        return notes, unverified
    except SafetensorError as error:
        raise OutputError(f"writing {path} failed, nothing was left there: {error}") from error
