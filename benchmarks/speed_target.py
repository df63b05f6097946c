"""A target in speed beside a ratio alone at the same speed: the table in benchmarks/results/speed-target.md.

    python benchmarks/speed_target.py --work /some/disk --out benchmarks/results/speed-target --data data

prunes a model with `--speedup`; then by loss per parameter, at the ratio at which the same table of times promises the
same speed. The losses that the first run measured serve for the second, so that nothing but what the budget counts
differs between them. Both are timed in turn with the dense model, and compared with it on held-out text. `--data` is
the folder of `benchmarks/quality.py` (calibration: its C4 documents; held-out: WikiText-2 test and other C4 documents);
without it the texts of the demo serve. Finished parts are kept in --work: a killed run goes on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_table.texts import Texts

import slimgpt
from slimgpt.config import make_config
from slimgpt.evaluation.speed import measure_speed
from slimgpt.models.loading import load_config
from slimgpt.models.parameter_counts import describe
from slimgpt.models.random_weights import random_model
from slimgpt.models.source import locate
from slimgpt.planning.plan import Plan
from slimgpt.planning.plan_file import to_toml
from slimgpt.planning.planner import plan_for
from slimgpt.planning.restriction import restricted
from slimgpt.planning.speed_plan import smallest_plan
from slimgpt.planning.speed_table import SpeedTable, SpeedTarget
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.devices import DTYPES, dtype_name
from slimgpt.runtime.versions import timed_machine, versions
from slimgpt.scanning.prediction import measured_size
from slimgpt.sensitivity.allocate import allocated

REACHED_WITHIN = 0.05
"""How far the reached speed may be from the one asked for."""

FORMS = {"speed": "`--speedup`", "ratio": "ratio alone"}


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    model: str = "demo",
    speedups: str = "1.3,1.6",
    num_samples: int = 32,
    seq_len: int = 512,
    batch: int = 1,
    prompt: int = 512,
    new_tokens: int = 128,
    rounds: Annotated[int, typer.Option(help="Timed rounds of the three models.")] = 5,
    data: Annotated[Path | None, typer.Option(help="Folder of texts, as for quality.py.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of each held-out text.")] = 16_384,
    window: int = 512,
) -> None:
    """Prune what is missing, time, compare, write."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {"num_samples": num_samples, "seq_len": seq_len}
    request = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
    calibration, texts = "demo", {"speeches, held out": "demo"}
    if data is not None:
        calibration, texts = str(work / "c4-calibration.jsonl"), {}
        documents = Texts(data).documents("c4")
        lines = (json.dumps({"text": str(document)}) + "\n" for document in documents)
        Path(calibration).write_text("".join(lines), encoding="utf-8")
        for name, title in (("wikitext2", "WikiText-2"), ("c4", "C4, held out")):
            texts[title] = str(work / f"{name}.txt")
            Path(texts[title]).write_text(Texts(data).held_out(name, validation=False), encoding="utf-8")
    rows = []
    for speedup in map(float, speedups.split(",")):

        def kept(name: str, make: Callable[[], Any], speedup: float = speedup) -> Any:
            """What a part has given, from its file if it was worked out before."""
            file = work / f"{name}-{speedup:g}.json"
            if not file.is_file():
                file.write_text(json.dumps(make()) + "\n", encoding="utf-8")
            return json.loads(file.read_text(encoding="utf-8"))

        def pruned(form: str, target: dict[str, Any], speedup: float = speedup) -> PruneReport:
            folder = work / f"{form}-{speedup:g}"
            typer.echo(f"pruning {folder.name}")
            return slimgpt.prune_folder(
                model, folder, None, calibration, device="cpu", resume=True, **settings, **target
            )

        table = work / "speed-table.json"
        fast = pruned("speed", {"speedup": speedup, "speed_table": str(table), **request})
        plan = work / f"ratio-{speedup:g}.toml"
        if not plan.is_file():
            plan.write_text(to_toml(plan_by_ratio(model, fast, settings), fast.model_type), encoding="utf-8")
        reports = {"speed": fast, "ratio": pruned("ratio", {"plan": str(plan)})}
        target, shape = target_of(fast), describe(config_of(model))
        seconds = kept("times", lambda reports=reports: times(model, reports, request, rounds))
        for form, report in reports.items():
            folder = work / f"{form}-{speedup:g}"
            far = kept(f"far-{form}", lambda folder=folder: divergences(folder, model, texts, window, max_tokens))
            bundled = report.divergence.get("bundled", {}).get("kl")
            far = {"bundled": {"kl": bundled["mean"], "stderr": bundled["stderr"]}, **far} if bundled else far
            rows.append(
                {
                    "speedup": speedup,
                    "form": form,
                    "removed": report.plan.achieved,
                    "promised": target.promised(shape, report.plan.layers),
                    "reached": sum(seconds["dense"].values()) / sum(seconds[form].values()),
                    "seconds": {"dense": seconds["dense"], "slim": seconds[form]},
                    "kl": far,
                    "layers": [dict(sizes) for sizes in report.plan.layers],
                }
            )
        machine = seconds["machine"]
        content = {
            "model": fast.base_model,
            "settings": {**settings, **request, "rounds": rounds, "window": window, "max_tokens": max_tokens},
            "calibration": "C4" if data is not None else calibration,
            "machine": machine,
            "versions": versions(torch.device("cpu")),
            "rows": rows,
        }
        out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page(content), encoding="utf-8")


def config_of(model: str) -> Any:
    """The dense model's config."""
    return load_config(locate(model))


def target_of(report: PruneReport) -> SpeedTarget:
    """The target in speed of a run, with its table of times."""
    return SpeedTarget(SpeedTable.from_json(report.speed["table"]), report.speed["asked"])


def plan_by_ratio(model: str, fast: PruneReport, settings: dict[str, Any]) -> Plan:
    """The plan of the smallest ratio that the table promises the speed of a run by speed for, by loss per parameter.

    Args:
        fast: the run; its measured costs are used. Without any, the plan is that of the schedule, as the run's is.
    """
    model_config, target = config_of(model), target_of(fast)
    shape, costs = describe(model_config), measured_size(fast, ()).costs
    wanted = target.promised(shape, fast.plan.layers)

    def plan_of(ratio: float) -> Plan | None:
        config = make_config(ratio=ratio, **settings)
        own = restricted(shape, config)
        try:
            plan = plan_for(model_config, config, own)
        except slimgpt.errors.PlanError:
            return None
        return plan if costs is None else allocated(plan, own, costs, config, model_config)[0]

    plan = smallest_plan(plan_of, lambda plan: target.promised(shape, plan.layers) >= wanted)
    if plan is None:
        raise SystemExit(f"no ratio is {wanted:.2f} times as fast by the table")
    return plan


def times(model: str, reports: dict[str, PruneReport], request: dict[str, int], rounds: int) -> dict[str, Any]:
    """Seconds of the dense and both slim models, timed in turn with random weights: time does not depend on values."""
    config, device = config_of(model), torch.device("cpu")
    dtype = DTYPES[reports["speed"].speed["table"]["machine"]["dtype"]]
    widths = {"dense": reports["speed"].dense_sizes, **{form: report.plan.layers for form, report in reports.items()}}
    models = [random_model(config, sizes, device, dtype) for sizes in widths.values()]
    batch, prompt, new_tokens = request.values()
    speeds = measure_speed(models, prompt, new_tokens, rounds, batch=batch)
    seconds = {
        form: {"prompt": batch * prompt / speed.prefill, "new_tokens": batch * new_tokens / speed.decode}
        for form, speed in zip(widths, speeds)
    }
    return {**seconds, "machine": {**timed_machine(device, dtype), "dtype": dtype_name(dtype)}}


def divergences(folder: Path, base: str, texts: dict[str, str], window: int, max_tokens: int) -> dict[str, Any]:
    """The KL divergence of a folder from its base by text, in nats per token."""
    slim, tokenizer = slimgpt.load(str(folder), dtype="float32", device="cpu")
    dense = slimgpt.load(base, dtype="float32", device="cpu")[0]
    figures = {}
    for title, text in texts.items():
        measured = slimgpt.evaluate(
            slim, tokenizer, text, window=window, max_tokens=max_tokens, batch_size=2, against=dense
        )
        assert measured.divergence is not None
        kl = asdict(measured.divergence.kl)
        figures[title] = {"kl": kl["mean"], "stderr": kl["stderr"], "perplexity": measured.perplexity}
    return figures


def page(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, machine, rows = content["settings"], content["machine"], content["rows"]
    titles = list(rows[0]["kl"])
    lines = [
        f"# {content['model']}: a target in speed beside a ratio alone at the same speed",
        "",
        "Both plans promise the same speed by the same table of times, and spend the same measured losses: `--speedup` "
        f"by loss per millisecond, the other by loss per parameter. Pruned on {settings['num_samples']} x "
        f"{settings['seq_len']} tokens of {content['calibration']}; a request is {settings['batch']} x "
        f"{settings['prompt']} prompt tokens and {settings['new_tokens']} new ones, timed in turn with the dense model "
        f"({settings['rounds']} rounds, medians) on {machine['processor']}, {machine['dtype']}, {machine['threads']} "
        f"thread(s). KL divergence from the dense model in nats per token, with its standard error; texts but the "
        f"bundled one at window {settings['window']}, {settings['max_tokens']:,} tokens at most. One seed.",
        "",
        f"| asked | plan | removed | promised | reached | {' | '.join(f'KL, {title}' for title in titles)} |",
        "|---|---|---|---|---|" + "---|" * len(titles),
    ]
    for row in rows:
        near = abs(row["reached"] / row["speedup"] - 1) <= REACHED_WITHIN
        mark = "" if near or row["form"] != "speed" else f" (not within {REACHED_WITHIN:.0%})"
        kl = " | ".join(f"{row['kl'][title]['kl']:.3f} ± {row['kl'][title]['stderr']:.3f}" for title in titles)
        lines.append(
            f"| {row['speedup']:g} | {FORMS[row['form']]} | {row['removed']:.2%} | {row['promised']:.3f} "
            f"| {row['reached']:.3f}{mark} | {kl} |"
        )
    lines += ["", *verdict(rows), ""]
    made_with = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, f"Written by `benchmarks/speed_target.py` with {made_with}.", ""])


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """By how much the mean KL over the texts differs, a line for each speed."""
    lines = []
    for fast, alone in zip(rows[::2], rows[1::2]):
        mean = [statistics.fmean(far["kl"] for far in row["kl"].values()) for row in (fast, alone)]
        change = f"{mean[0] / mean[1] - 1:+.1%}"
        lines.append(
            f"- {fast['speedup']:g}: mean KL {mean[0]:.3f} with `--speedup`, {mean[1]:.3f} by ratio alone ({change})"
        )
    return lines


if __name__ == "__main__":
    typer.run(main)
