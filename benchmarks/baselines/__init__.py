"""What people use instead, written anew after each paper: the METHODS table.

A method changes a model in place: ``apply(model, job)``. Baselines have no repair but where their own paper has
one; ``repairable`` ones can be followed by ours, which is a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from baselines.flap import flap
from baselines.llm_pruner import llm_pruner
from baselines.obs import NAME as OBS
from baselines.obs import obs_uniform
from baselines.package import pruned
from baselines.shortgpt import shortgpt
from baselines.units import Job
from slimgpt.solver import CRITERIA


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Args:
        apply: changes the model in place.
        title: as the table calls it.
        repairable: leaves weights as they were, so that a row with our repair says something.
        ours: takes the arguments of ``slimgpt.prune``.
    """

    apply: Callable[[PreTrainedModel, Job], None]
    title: str
    repairable: bool = False
    ours: bool = False


METHODS: dict[str, Method] = {
    name: Method(partial(pruned, method=name), criterion.source, ours=True) for name, criterion in CRITERIA.items()
}
METHODS |= {
    "slimgpt": Method(partial(pruned, method="slimgpt"), "SlimGPT, our default", ours=True),
    "slimgpt-search": Method(
        partial(pruned, method="slimgpt", allocation="search"), "SlimGPT with `--allocation search`", ours=True
    ),
    "slimgpt-uniform": Method(
        partial(pruned, method="slimgpt", uniform=True), "SlimGPT with `--uniform`, as `--for vllm`", ours=True
    ),
    "slimgpt-4-widths": Method(
        partial(pruned, method="slimgpt", num_widths=4), "SlimGPT with `--num-widths 4`", ours=True
    ),
    "paper": Method(partial(pruned, method="paper"), "SlimGPT as published (arXiv 2412.18110)", ours=True),
    # As FLAP's authors run both: the same share of every layer.
    "magnitude": Method(
        partial(pruned, method="magnitude", schedule="uniform"), "magnitude of the output columns", repairable=True
    ),
    "wanda": Method(
        partial(pruned, method="wanda", schedule="uniform"), "Wanda, structured (arXiv 2306.11695)", repairable=True
    ),
    "flap": Method(flap, "FLAP, global ranking and bias (arXiv 2312.11983)", repairable=True),
    "llm-pruner": Method(
        llm_pruner, "LLM-Pruner, first-order Taylor, layers 4-29 of 32 (arXiv 2305.11627)", repairable=True
    ),
    OBS: Method(obs_uniform, "exact OBS in equal layers, after ZipLM and OSSCAR (arXiv 2302.04089, 2403.12983)"),
    "shortgpt": Method(shortgpt, "ShortGPT, whole layers by Block Influence (arXiv 2403.03853)"),
}
"""Methods by name; every criterion of the package is one, so that a variant in research is a row too."""

COMPARED = ("paper", "slimgpt", "slimgpt-search", "magnitude", "wanda", "flap", "llm-pruner", OBS, "shortgpt")
"""The methods of the main table, in its order."""
