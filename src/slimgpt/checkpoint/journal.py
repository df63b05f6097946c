"""Finished layers of a run on disk, so that a killed run goes on where it stopped.

A run that will write ``OUT`` works in ``.OUT.unfinished`` beside it::

    journal.json                what the run was asked for; another request is refused
    layers/00012.json           the report of a layer
    layers/00012.safetensors    its weights under their final names: the file is a shard of the checkpoint to be
    distilled/00012.safetensors the same layer with what was trained afterwards, if it is better
    distillation.json           what that training gave; it is finished once this is there
    text.safetensors            text that the dense model has written for it, and its last layer's hidden states
    training.safetensors        what it has reached
    self-calibration/00000.json a round of calibration text that the model has written
    scratch/                    activations that memory had no room for
    folder/                     the checkpoint while it is put together
    replaced/                   what was at OUT before, until the new checkpoint is there

A layer is finished once its safetensors file has its name, which it gets when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from slimgpt.checkpoint.kept_files import (
    check_file,
    file_checksum,
    file_checksums,
    read_checked_tensors,
    read_values,
    reading,
    write_checked_tensors,
    write_values,
)
from slimgpt.distillation.generate import GeneratedText
from slimgpt.errors import OutputError, ResumeError
from slimgpt.io.atomic import publish, write_text
from slimgpt.io.tensors import write_tensors
from slimgpt.models.slicing import State
from slimgpt.pruning.report import LayerReport, PrunedLayer

JOURNAL_FILE, DISCARDED_FILE = "journal.json", "discarded.json"
WEIGHTS_CHECKSUM = "weights_crc32"
"""In a layer's report while it is in the journal: of the bytes of its weights file, which gets its name last."""

DISTILLATION_FILE = "distillation.json"
TEXT_FILE, TRAINING_FILE, SELF_WRITTEN = "text.safetensors", "training.safetensors", "self-calibration"


class Journal:
    """The working folder of one run.

    Args:
        output: the folder that the run will write.
        prefix: name of the module list that holds the layers, such as ``model.layers``.
        request: what decides the result, as JSON values; see :meth:`open`.
    """

    def __init__(self, output: Path, prefix: str, request: dict[str, Any]):
        self.output, self.prefix = output, prefix
        self.request = json.loads(json.dumps(request))  # as it will be read back
        self.folder = unfinished_folder(output)
        self.layers = self.folder / "layers"
        self.distilled = self.folder / "distilled"
        self.scratch = self.folder / "scratch"

    def open(self, resume: bool, overwrite: bool = False) -> int:
        """Begin, or go on; the number of layers that are finished.

        Args:
            resume: go on with an unfinished run if there is one.
            overwrite: start anew in place of an unfinished run.

        Raises:
            ResumeError: an unfinished run of another request, or one that was not asked for.
        """
        open_unfinished(self.folder, self.request, resume, overwrite, self.discard)
        self.layers.mkdir(exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        for leftover in self.layers.glob("*.tmp"):
            leftover.unlink()
        finished = sorted(self.layers.glob("*.safetensors"))
        for index, file in enumerate(finished):
            check_file(file, self._report(index)[WEIGHTS_CHECKSUM])
        return len(finished)

    def __call__(self, index: int) -> PrunedLayer | None:
        """A finished layer, or ``None``.

        Raises:
            ResumeError: its files are damaged.
        """
        weights, _ = self.files(index)
        if not weights.is_file():
            return None
        values = self._report(index)
        with reading(weights):
            values.pop(WEIGHTS_CHECKSUM)
            return PrunedLayer(LayerReport.from_json(values), _tensors(weights, len(f"{self.prefix}.{index}.")))

    def _report(self, index: int) -> dict[str, Any]:
        """The report of a finished layer, with the checksum of its weights."""
        values = read_values(file := self.files(index)[1])
        with reading(file):
            if values["layer"] != index or not isinstance(values[WEIGHTS_CHECKSUM], int):
                raise ValueError("it is of another layer")
        return values

    def write(self, finished: PrunedLayer) -> None:
        """Keep a layer.

        Raises:
            OutputError: the disk is full.
        """
        index = finished.report.layer
        weights, report = self.files(index)
        with self._writing(weights, kept=index > 0):
            draft = self._write_draft(weights, index, finished.state)
            write_values(report, {**finished.report.to_json(), WEIGHTS_CHECKSUM: file_checksum(draft)})
            publish(draft, weights)

    def write_distilled(self, states: Iterable[State], info: dict[str, Any]) -> None:
        """Keep the trained layers, and the report's entry on the training.

        Raises:
            OutputError: the disk is full.
        """
        with self._writing(self.distilled, kept=True):
            self.distilled.mkdir(exist_ok=True)
            for index, state in enumerate(states):
                file = self.distilled / self.files(index)[0].name
                publish(self._write_draft(file, index, state), file)
            layers = file_checksums(sorted(self.distilled.glob("*.safetensors")))
            write_values(self.folder / DISTILLATION_FILE, {"report": info, "layers": layers})

    def write_generated(self, text: GeneratedText) -> None:
        """Keep the text that the dense model has written; a full disk is an :class:`OutputError`."""
        self._write(self.folder / TEXT_FILE, text._asdict())

    def generated(self) -> GeneratedText | None:
        """The text that the dense model has written, if it is kept; a damaged file is a :class:`ResumeError`."""
        file = self.folder / TEXT_FILE
        with reading(file):
            return GeneratedText(**read_checked_tensors(file)) if file.is_file() else None

    def write_training(self, reached: State) -> None:
        """Keep what the training has reached, in place of what it had before; not where the disk has no room for it
        beside the layers that are still to be written.

        Raises:
            OutputError: the disk is full.
        """
        layers = sum(file.stat().st_size for file in self.layers.glob("*.safetensors"))
        if sum(tensor.nbytes for tensor in reached.values()) + layers < shutil.disk_usage(self.folder).free:
            self._write(self.folder / TRAINING_FILE, reached)

    def training(self) -> State | None:
        """State of the training in the run being resumed.

        Raises:
            ResumeError: it is damaged.
        """
        file = self.folder / TRAINING_FILE
        return read_checked_tensors(file) if file.is_file() else None

    def _write(self, file: Path, tensors: State) -> None:
        with self._writing(file, kept=True):
            write_checked_tensors(file, tensors)

    def distillation_info(self) -> dict[str, Any] | None:
        """The report's entry on the training, if it is finished.

        Raises:
            ResumeError: it or a trained layer is damaged.
        """
        file = self.folder / DISTILLATION_FILE
        if not file.is_file():
            return None
        values = read_values(file)
        with reading(file):
            for name, checksum in values["layers"].items():
                check_file(self.distilled / name, checksum)
            return values["report"]

    def weights(self, index: int) -> Path:
        """The file of a layer's weights as they are to be saved."""
        layer = self.files(index)[0]
        trained = self.distilled / layer.name
        return trained if trained.is_file() else layer

    def final_state(self, index: int) -> State:
        """The weights of a layer to be saved, by their names inside it; a damaged file is a :class:`ResumeError`."""
        with reading(file := self.weights(index)):
            return _tensors(file, len(f"{self.prefix}.{index}."))

    def _write_draft(self, file: Path, index: int, state: State) -> Path:
        start, draft = f"{self.prefix}.{index}.", file.with_suffix(".tmp")
        write_tensors({start + name: tensor for name, tensor in state.items()}, draft)
        return draft

    @contextmanager
    def _writing(self, file: Path, kept: bool) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"writing {file} failed: {error}; free some space, then go on with --resume"
                if kept
                else f"writing {self.output} failed, nothing was left there: {error}"
            ) from error

    def files(self, index: int) -> tuple[Path, Path]:
        """The files of a layer's weights and report."""
        return self.layers / f"{index:05d}.safetensors", self.layers / f"{index:05d}.json"

    def close(self) -> bool:
        """Stop an unfinished run; returns whether a layer or some text is finished, so that it was kept."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        worth = any(self.layers.glob("*.safetensors")) or any((self.folder / SELF_WRITTEN).glob("*.json"))
        if not worth:
            self.discard()
        return worth

    def discard(self) -> None:
        """Remove the working folder; what was being replaced gets its name back."""
        if (replaced := self.folder / "replaced").exists() and not self.output.exists():
            replaced.rename(self.output)
        delete_unfinished(self.folder)


def _tensors(file: Path, start: int = 0) -> State:
    with safe_open(file, framework="pt") as handle:
        return {name[start:]: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def open_unfinished(
    folder: Path, request: dict[str, Any], resume: bool, overwrite: bool, discard: Callable[[], None]
) -> None:
    """Begin an unfinished run in its folder, or go on with it.

    Args:
        request: what decides the result, as it is read back from JSON.
        resume: go on with an unfinished run if there is one.
        overwrite: start anew in place of an unfinished run.
        discard: removes the folder.

    Raises:
        ResumeError: an unfinished run of another request, or one that was not asked for.
        OutputError: the disk is full.
    """
    file = folder / JOURNAL_FILE
    if folder.exists() and not file.is_file():
        _check_ours(folder)  # killed before it had begun, or while it was cleared away
        discard()
    if folder.exists() and not resume:
        if not overwrite:
            raise ResumeError(
                f"an unfinished run is in {folder}; pass --resume to go on with it, or --overwrite to start anew"
            )
        discard()
    if not folder.exists():
        folder.mkdir(parents=True)
        try:
            write_text(file, json.dumps(request, indent=1))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(f"writing {file} failed, nothing was left there: {error}; free some space") from error
    with reading(file):
        before = json.loads(file.read_text(encoding="utf-8"))
    mismatches = differences(before, request)
    if mismatches:
        raise ResumeError(
            f"the unfinished run in {folder} is another one: {'; '.join(mismatches)}. Give the same options again, or "
            "--overwrite without --resume to start anew"
        )


def _check_ours(folder: Path) -> None:
    """Refuse a folder of the working folder's name that no run has made.

    Raises:
        OutputError: it is a link or a file, or something else is in it.
    """
    whole = folder.is_dir() and not folder.is_symlink()
    entries = [entry for entry in folder.iterdir() if entry.name != f"{JOURNAL_FILE}.tmp"] if whole else []
    if not whole or (entries and not (folder / DISCARDED_FILE).is_file()):
        others = f" ({entries[0].name}, ...)" if whole else ""
        raise OutputError(
            f"{folder} is where this run would keep its layers, and no run of ours has made it{others}; move it away, "
            "or give another folder for the result"
        )


def delete_unfinished(folder: Path) -> None:
    """Remove a working folder; what tells that it is ours goes last, so that a kill in between is understood."""
    journal, discarded = folder / JOURNAL_FILE, folder / DISCARDED_FILE
    if journal.is_file():
        journal.replace(discarded)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != discarded:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def unfinished_folder(output: Path) -> Path:
    """Working folder of a run that will write ``output``."""
    return output.parent / f".{output.name}.unfinished"


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Differences of two requests, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [text for key in keys for text in differences(before.get(key), now.get(key), f"{where}{key} ".lstrip())]
    if before == now:
        return []
    if isinstance(before, (list, dict)) or isinstance(now, (list, dict)) or len(str(before)) + len(str(now)) > 100:
        return [f"{where.strip()} differs"]
    return [f"{where.strip()} was {before}, now {now}"]
