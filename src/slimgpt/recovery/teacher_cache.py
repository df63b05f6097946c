"""Teacher predictions for the training tokens in memory-mapped files, so that the teacher need not stay in memory."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.checkpoint.kept_files import (
    check_file,
    compare_checksums,
    file_checksums,
    read_values,
    reading,
    write_values,
)
from slimgpt.errors import NumericalError, OutputError
from slimgpt.losses.chunked import log_probabilities
from slimgpt.losses.distillation import predicted
from slimgpt.recovery.dataset import Example, collate
from slimgpt.recovery.sharding import is_sharded, max_over_ranks
from slimgpt.runtime.activation_store import reserve
from slimgpt.runtime.distributed import ALONE, Ranks

COMPLETE = "complete.json"


def layer_numbers(count: int, depth: int) -> list[int]:
    """The layers whose outputs are compared, as indices into ``hidden_states``: evenly spaced, ending in the last."""
    count = min(count, depth)
    return [round((number + 1) * depth / count) for number in range(count)]


@dataclass
class TeacherCache:
    """Files of one row per predicted token of the training examples, in their order.

    Args:
        folder: where they are: ``tokens.npy`` ``(rows, k)`` int32, ``log_p.npy`` ``(rows, k)`` float16 and, where
            layers are compared, ``layers.npy`` ``(rows, layers, hidden)``, the bits of bfloat16.
        examples: the training examples.
        top_k: the most likely tokens to keep.
        hidden: number of layers and hidden size, where layer outputs are cached.
        flush_every: batches between two flushes to disk, from which a killed run resumes.
    """

    folder: Path
    examples: Sequence[Example]
    top_k: int
    hidden: tuple[int, int] | None = None
    flush_every: int = 32

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(example.predicted for example in self.examples)]
        self.files: dict[str, np.ndarray] = {}

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every file."""
        rows = self.starts[-1]
        layout: dict[str, tuple[tuple[int, ...], str]] = {
            "tokens": ((rows, self.top_k), "int32"),
            "log_p": ((rows, self.top_k), "float16"),
        }
        if self.hidden is not None:
            layout["layers"] = ((rows, *self.hidden), "int16")
        return layout

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.layout.values())

    def create(self) -> None:
        """Create the files, unless they exist.

        Raises:
            OutputError: the disk has too little room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if all((self.folder / f"{name}.npy").is_file() for name in self.layout):
            return
        for mark in (self.folder / COMPLETE, *self.folder.glob("done-*.json")):
            mark.unlink(missing_ok=True)  # of files that are gone
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free:
            raise OutputError(
                f"the teacher's predictions take {self.bytes / 1e9:.1f} GB beside the output, where "
                f"{free / 1e9:.1f} GB are free; lower --top-k or --max-steps, or leave --layer-weight at 0"
            )
        for name, (shape, kind) in self.layout.items():
            file = self.folder / f"{name}.npy"
            try:
                np.lib.format.open_memmap(file, "w+", np.dtype(kind), shape)
                reserve(file, file.stat().st_size)
            except OSError as error:
                file.unlink(missing_ok=True)
                raise OutputError(
                    f"writing {file} failed: {error}; free some space, then go on with --resume"
                ) from error

    def open(self, mode: str) -> None:
        """Map the files: ``r`` or ``r+``.

        Raises:
            ResumeError: one is damaged.
        """
        for name, (shape, kind) in self.layout.items():
            file = self.folder / f"{name}.npy"
            with reading(file):
                values = np.load(file, mmap_mode=mode, allow_pickle=False)  # type: ignore[call-overload]
                if values.shape != shape or values.dtype != kind:
                    raise ValueError(f"it is {values.dtype} {values.shape}, and the examples need {kind} {shape}")
                self.files[name] = values

    @property
    def complete(self) -> bool:
        """Whether all predictions are there, whatever the number of processes that took them."""
        return (self.folder / COMPLETE).is_file()

    def mark_complete(self) -> None:
        """Say that all predictions are there, with the checksums of the files."""
        write_values(self.folder / COMPLETE, file_checksums(self.folder / f"{name}.npy" for name in self.layout))

    def check(self) -> None:
        """Compare complete files with the checksums that they had.

        Raises:
            ResumeError: one has changed.
        """
        checksums = read_values(self.folder / COMPLETE)
        for name in self.layout:
            with reading(self.folder / COMPLETE):
                checksum = checksums[f"{name}.npy"]
            check_file(self.folder / f"{name}.npy", checksum)

    @torch.no_grad()
    def fill(
        self,
        teacher: PreTrainedModel,
        batch_size: int,
        ranks: Ranks = ALONE,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the dense model over this process's share of the examples, from where a killed run stopped.

        Raises:
            NumericalError: the dense model's predictions are no numbers.
            ResumeError: those of a killed run have changed.
        """
        self.open("r+")
        mark = self.folder / f"done-{ranks.rank}-of-{ranks.world}.json"
        share = range(ranks.rank, len(self.examples), ranks.world)
        done, checksums = self._done(mark, share)
        numbers = layer_numbers(self.hidden[0], teacher.config.num_hidden_layers) if self.hidden else []
        starts = range(done, len(share), batch_size)
        # Through a divided model all processes go equally often. Its layers are gathered on the way, so the processes
        # have to agree before the first forward pass: messages of two kinds must not meet.
        idle = max_over_ranks(ranks, len(starts)) - len(starts) if is_sharded(teacher) else 0
        for count, start in enumerate(starts, start=1):
            chosen = list(share[start : start + batch_size])
            self._fill_batch(teacher, chosen, numbers)
            checksums = self._row_checksums(chosen, checksums)
            stop = min(start + batch_size, len(share))
            if count % self.flush_every == 0 or stop == len(share):
                for values in self.files.values():
                    values.flush()  # type: ignore[attr-defined]
                write_values(mark, {"done": stop, "checksums": checksums})
            if progress:
                progress(stop, len(share))
        for _ in range(idle):
            self._predict(teacher, [0], numbers)

    def _done(self, mark: Path, share: Sequence[int]) -> tuple[int, dict[str, int]]:
        """The number of examples of a share that have their predictions, and the checksums of these by file.

        Raises:
            ResumeError: they have changed.
        """
        if not mark.is_file():
            return 0, {}
        values = read_values(mark)
        with reading(mark):
            done, before = values["done"], values["checksums"]
            now = self._row_checksums(share[:done], {})
        for name, checksum in now.items():
            with reading(self.folder / f"{name}.npy"):
                compare_checksums(before[name], checksum)
        return done, now

    def _row_checksums(self, chosen: Iterable[int], before: Mapping[str, int]) -> dict[str, int]:
        """CRC-32 of the rows of some examples by file, going on from that of the examples before."""
        checksums = dict(before)
        for index in chosen:
            for name, values in self.files.items():
                rows = values[self.starts[index] : self.starts[index + 1]]
                checksums[name] = zlib.crc32(rows.tobytes(), checksums.get(name, 0))
        return checksums

    def _predict(self, teacher: PreTrainedModel, chosen: list[int], numbers: list[int]) -> tuple[Any, Tensor]:
        """The dense model's outputs for some examples, and their labels."""
        batch = collate([self.examples[index] for index in chosen], 0)
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        return teacher(**batch, use_cache=False, output_hidden_states=bool(numbers)), labels

    def _fill_batch(self, teacher: PreTrainedModel, chosen: list[int], numbers: list[int]) -> None:
        outputs, labels = self._predict(teacher, chosen, numbers)
        logits, _ = predicted(outputs.logits, labels)
        tokens = logits.topk(self.top_k, -1).indices
        log_p = log_probabilities(logits, tokens)
        if not log_p.isfinite().all():
            raise NumericalError("the dense model's predictions are NaN or infinite; try --dtype float32")
        predictions = {"tokens": tokens.int().cpu().numpy(), "log_p": log_p.half().cpu().numpy()}
        if numbers:
            states = torch.stack([predicted(outputs.hidden_states[number], labels)[0] for number in numbers], 1)
            predictions["layers"] = states.bfloat16().view(torch.int16).cpu().numpy()
        row = 0
        for index in chosen:
            start, stop = self.starts[index], self.starts[index + 1]
            for name, array in predictions.items():
                self.files[name][start:stop] = array[row : row + stop - start]
            row += stop - start

    def rows(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Cached predictions for the predicted tokens of some examples, concatenated: ``(tokens, ...)``."""
        if not self.files:
            self.open("r")
        picked = {
            name: torch.from_numpy(
                np.concatenate([values[self.starts[index] : self.starts[index + 1]] for index in chosen])
            )
            for name, values in self.files.items()
        }
        picked["tokens"] = picked["tokens"].long()
        if "layers" in picked:
            picked["layers"] = picked["layers"].view(torch.bfloat16)
        return {f"teacher_{name}": tensor for name, tensor in picked.items()}
