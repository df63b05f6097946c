"""The model card that goes with a slim model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.checkpoint.card_metadata import card_metadata
from slimgpt.checkpoint.commands import commands, public_name, public_source
from slimgpt.models.families.moe import ffn_text
from slimgpt.planning.engine_releases import BY_LAYER, releases_for_folder
from slimgpt.pruning.report import PruneReport

EXPORTS = "## Exports"
"""The heading under which exports of a folder are listed, at the end of its card."""

WIDTHS_DIFFER = (
    f"The layers differ in width (`per_layer_config` in config.json), so this needs transformers {BY_LAYER}; its "
    "note about reading global config values on the way in is harmless.",
    "",
)


def model_card(report: PruneReport, bytes_on_disk: int, own_code: bool, origin: str | Path | None = None) -> str:
    """README.md of a checkpoint: what it is, how to load it, what was removed, and how it was made.

    Args:
        own_code: whether the folder has a modeling file.
        origin: see :func:`card_metadata`.
    """
    plan = report.plan
    base = public_name(report.base_model)
    load = (
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # runs modeling_slim.py in this folder"
        if own_code
        else "AutoModelForCausalLM.from_pretrained(folder)  # a stock class: no code of ours"
    )
    lines = [
        "---",
        card_metadata(report, origin).strip(),
        "---",
        "",
        f"# {_plain(base)}, pruned by {plan.achieved:.1%}",
        "",
        f"{plan.achieved:.2%} of the decoder layers' parameters of {_code(base)} were removed by "
        "[SlimGPT](https://arxiv.org/abs/2412.18110) structured pruning: whole attention heads and FFN channels. "
        f"{_training(report)} {_read_from(report)}The licence of the base model applies.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = {load}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
        *(WIDTHS_DIFFER if own_code else ()),
        f"Engines and tools in the same environment: {releases_for_folder(own_code)}.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {plan.parameters_before:,} | {plan.parameters:,} |",
        f"| bytes of weights | | {bytes_on_disk:,} |",
        *(
            f"| {name} | {values['before']} | {values['after']} |"
            for name, values in report.evaluation.get("table", {}).items()
        ),
        "",
        *_divergence(report),
        *_measured(report),
        "![widths per layer](widths.png)",
        "",
        "## Layers",
        "",
        "| layer | heads | KV heads | FFN | removed | error of attention | error of FFN |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in report.layers:
        s = layer.sizes
        lines.append(
            f"| {layer.layer} | {s['num_attention_heads']} | {s['num_key_value_heads']} | {ffn_text(s)} "
            f"| {1 - layer.parameters / layer.parameters_before:.1%} "
            f"| {layer.percent('heads')} | {layer.percent('channels')} |"
        )
    calibration = report.calibration
    lines += [
        "",
        "The error of a matrix is `E||Wx - W'x_K||^2 / E||Wx||^2` over the calibration tokens.",
        "",
        "## Made with",
        "",
        "```",
        "\n\n".join(commands(report)),
        "```",
        "",
        f"- calibration tokens: {calibration['num_samples']} x {calibration['seq_len']}, "
        f"SHA-256 of the ids `{calibration['sha256']}`",
        f"- versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        "- everything else, the kept units among it: `slimgpt.json`",
        "",
    ]
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A name as Markdown text: what would be markup or HTML is escaped."""
    return re.sub(r"([\\`*\[\]<>&|#!])", r"\\\1", name)


def _code(name: str) -> str:
    """A name as a code span, in a fence longer than its own backticks."""
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{name}{space}{fence}"


def _training(report: PruneReport) -> str:
    """Whether and how the model was trained after pruning."""
    info, texts = report.distillation, []
    if info.get("kept"):
        before, after = info["divergence"]["before"], info["divergence"]["after"]
        texts.append(
            f"Its layers were then trained together on {info['tokens']:,} calibration tokens, towards what the dense "
            f"model predicts and the text says: {before:.3f} nats per token away from the dense model before, "
            f"{after:.3f} after, on calibration text that was not trained on. The errors by layer below are those "
            "before."
        )
    runs = []
    for run in report.recovery:
        settings, data, curve = run["settings"], run["data"], run["curve"]
        losses = [loss for _, loss in curve["held_out"]]
        held_out = f"; held-out loss {losses[0]:.3f} before, {min(losses):.3f} after" if losses else ""
        teacher = f" with {run['execution']['teacher']} as teacher" if run["execution"]["teacher"] else ""
        runs.append(
            f"`{settings['method']}`{teacher}, {curve['kept']} of {curve['steps']} steps of {settings['batch_size']} "
            f"examples of {_sources(data)} at learning rate "
            f"{settings['learning_rate']:g}{held_out}"
        )
    if runs:
        texts.append(
            f"Afterwards it was trained ({'; then '.join(runs)}): see `recovery.json` and `recovery.png`; the errors "
            "by layer below are those of pruning."
        )
    return " ".join(texts) or "It is not retrained."


def _read_from(report: PruneReport) -> str:
    """The checkpoint that the base model's numbers were unpacked from, where it was quantised."""
    read = report.quantization
    if not read:
        return ""
    return f"The base model's files were quantised ({read['format']}) and read as {read['read_as']}. "


def _sources(data: dict[str, Any]) -> str:
    """The texts of a training."""
    return ", ".join(_code(public_source(source, data.get("datasets"))) for source in data["sources"])


def _measured(report: PruneReport) -> list[str]:
    """The figures that were added to the card; nothing if there are none."""
    results = report.evaluation.get("results", ())
    if not results:
        return []
    lines = ["## Measured afterwards", "", "| text or task | | figure |", "|---|---|---|"]
    for result in results:
        if "task" in result:
            error = f" ± {result['stderr']:.3f}" if result.get("stderr") is not None else ""
            endings = result.get("endings")
            ended = f"; {endings['either']:.1%} of the answers loop or never stop" if endings else ""
            lines.append(
                f"| {result['task']} | {result['rows']} rows | {result['metric']} {result['value']:.3f}{error}{ended} |"
            )
            continue
        figures = [f"perplexity {result['perplexity']:.2f}"]
        if result.get("kl_divergence") is not None:
            figures += [
                f"KL divergence from {_plain(result['base'])} {result['kl_divergence']:.3f} nats per token "
                f"({result['bits_per_byte']:.3f} bits per byte)",
                f"same most likely token {result['same_top']:.1%}",
            ]
        where = f"window {result['window']}, {result['tokens']:,} tokens"
        lines.append(f"| {_plain(result['text'])} | {where} | {', '.join(figures)} |")
    return [*lines, ""]


def _divergence(report: PruneReport) -> list[str]:
    """The KL divergence from the base model; nothing if it was not measured."""
    texts = {title: report.divergence[name] for name, title in FOR_PEOPLE.items() if name in report.divergence}
    if not texts:
        return []
    trained = "These are the figures from before the training with `recover`. " if report.recovery else ""
    window = next(iter(texts.values()))["window"]
    return [
        "## How far from the base model",
        "",
        "| text | tokens | KL divergence, nats per token | bits per byte | same most likely token | perplexity before "
        "| after |",
        "|---|---|---|---|---|---|---|",
        *(f"| {title} | {values['tokens']:,} | {_figures(values)} |" for title, values in texts.items()),
        "",
        f"{trained}Of the predictions of the next token, against the base model's, in windows of {window} tokens and "
        f"{report.divergence['dtype']}. The other text comes with SlimGPT: English prose, dialogue and code. What a "
        "chat model writes can lose more than these figures tell: try it on your own tasks.",
        "",
    ]


def _figures(values: dict[str, Any]) -> str:
    if "kl" not in values:
        return "NaN or infinity | | | |"
    kl, perplexity = values["kl"], values["perplexity"]
    return (
        f"{kl['mean']:.3f} ± {kl['stderr']:.3f} | {values['bits_per_byte']:.3f} | {values['same_top']:.1%} "
        f"| {perplexity['before']:.2f} | {perplexity['after']:.2f}"
    )
