"""Methods that `slimgpt.prune` has: ours, the paper's, and the baselines of the table of criteria."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

import slimgpt
from baselines.units import Job


def pruned(model: PreTrainedModel, job: Job, **arguments: Any) -> None:
    """Prune in place by `slimgpt.prune`.

    Args:
        arguments: what makes the method; the job's own arguments come on top.
    """
    layers = model.config.num_hidden_layers
    report = slimgpt.prune(
        model,
        None,
        ratio=job.ratio,
        calibration=job.windows,
        batch_size=job.batch_size,
        seed=job.seed,
        device=str(job.device),
        forward_dtype=job.dtype,
        on_layer=lambda report, _: job.on_step(report.layer + 1, layers),
        **{**arguments, "repair": job.repair, **dict(job.arguments)},
    )
    job.info["seconds_by_part"] = {
        "measuring": report.allocation.get("seconds", 0.0),
        "training": report.distillation.get("seconds", 0.0),
        "in_all": report.seconds,
    }
    job.info["distillation"] = {name: value for name, value in report.distillation.items() if name != "curve"}
