"""Calibration text that the model of a run writes, kept in the run's working folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from slimgpt.calibration.batch_generation import parameters_moved
from slimgpt.calibration.evaluation_text import evaluation_texts
from slimgpt.calibration.generation_limits import writing_dtype
from slimgpt.calibration.self_calibration import Rounds, SelfCalibration, write_calibration
from slimgpt.calibration.starts import starts_digest
from slimgpt.calibration.windows import digest
from slimgpt.checkpoint.kept_files import read_values, write_values
from slimgpt.distillation.data import OnRehearsed
from slimgpt.layerwise.on_demand import on_demand
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.loading import load_model
from slimgpt.models.lookup import text_config
from slimgpt.pipeline.callbacks import WRITING
from slimgpt.pipeline.prepare import PruneRequest
from slimgpt.pipeline.stages import PruneJob
from slimgpt.pipeline.weights_source import DenseLayers
from slimgpt.pruning.report import described
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import malloc_trim


@dataclass(frozen=True)
class KeptRounds:
    """Rounds of self-written text as JSON files in a folder."""

    folder: Path

    def read(self, number: int) -> dict[str, Any] | None:
        """A round that is kept.

        Raises:
            ResumeError: it is damaged.
        """
        file = self._file(number)
        return read_values(file) if file.is_file() else None

    def write(self, number: int, values: dict[str, Any]) -> None:
        """Keep a round."""
        self.folder.mkdir(exist_ok=True)
        write_values(self._file(number), values)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def described_before(request: PruneRequest) -> dict[str, Any]:
    """Identity of a run's calibration text: the tokens themselves, or how the model is to write them."""
    text = request.text
    if text is None or not text.self_written:
        return described(request.windows, request.calibration)
    given = [digest(part.windows) for part in text.parts if part is not None]
    return {
        "source": request.calibration,
        "num_samples": text.shape[0],
        "seq_len": text.shape[1],
        "given": given,
        "held_out": text.held_out,
        "openings": starts_digest(),
    }


def with_self_written(
    request: PruneRequest,
    job: PruneJob,
    source: DenseLayers,
    ranks: Ranks,
    rounds: Rounds | None = None,
    on_rehearsed: OnRehearsed | None = None,
) -> PruneJob:
    """The job with calibration text that the model writes, and what is evaluated on, where such was asked for.

    Args:
        source: of the dense model, which is loaded whole for it where that fits.
        ranks: the processes of the run, which divide the documents.
        rounds: where the first process keeps finished rounds.
    """
    text = request.text
    if text is None or not text.self_written:
        return job

    def write(count: int, held_out: int) -> SelfCalibration:
        model, placed = source.model, parameters_moved
        if not request.whole:
            placed = on_demand(source, request.budget)
        elif source.streamed is not None:
            model = load_model(request.source, request.model_config, request.dtype, "cpu", request.trust_remote_code)
        return in_eval_mode(write_calibration)(
            model,
            request.tokenizer,
            count,
            request.config.seq_len,
            request.config.seed,
            held_out=held_out,
            device=request.device,
            dtype=writing_dtype(request.config.forward_dtype, request.stored, request.device),
            budget=request.budget,
            rounds=rounds,
            on_written=partial(on_rehearsed, WRITING) if on_rehearsed else None,
            ranks=ranks,
            placed=placed,
        )

    complete, info = text.complete(write)
    evaluation = {}
    if request.config.evaluate:
        evaluation = evaluation_texts(complete, request.tokenizer, text_config(request.model_config).vocab_size)
    malloc_trim()
    return replace(job, windows=complete.windows, evaluation=evaluation, calibration_info=info)
