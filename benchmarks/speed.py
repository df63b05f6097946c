"""How much faster a slim model is than its dense one, beside what its FLOPs and its bytes promise.

    python benchmarks/speed.py DENSE SLIM --out benchmarks/results/speed --batch 1,8 --prompt 512 --new-tokens 128

If SLIM is not there, DENSE is pruned to it first, by magnitude and to aligned widths: speed does not depend on what the
weights are. Both are timed in turn in one run, as `slimgpt speed SLIM --against DENSE` does it; the parts of a forward
pass that no pruning of layers makes smaller are timed alone. It writes OUT.json and OUT.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import slimgpt
from slimgpt import assets
from slimgpt.comparison import time_models
from slimgpt.models.families import ARCHITECTURES

PROSE = """# How fast is a slim model?

`slimgpt speed SLIM --against DENSE` times both models in turn within every round, so that a drift of the machine meets
them alike; prompts are random tokens from a fixed seed, medians of the rounds count. Peak memory is that of a fresh
process that loads the folder and generates. On a GPU the same command applies; none was at
hand for these figures.

"""

QUANTISED = " The dense model comes from a quantised file, whose reading is part of its peak memory."

GAP = """
## What stands between FLOPs and speed

- **The output matrix** ({vocab:,} x {hidden:,}) and the embedding stay as they are: {head_share:.0%} of the dense
  model's FLOPs per new token, {slim_head_share:.0%} of the slim one's. The ratio of FLOPs above has that in it already.
- **Decoding reads every weight once per step**, and the keys and values of every prompt: with {batch} prompts of
  {prompt} tokens these are {cache_share:.0%} of what the slim model reads, and {removed:.0%} of that is removed. So its
  bound is the ratio of bytes read, not that of FLOPs.
- **What every layer costs whatever its width**: {layers} times two norms, rotary positions, cache updates, and the
  calls from Python. Timed alone, as a model of the same depth whose matrices are cut to almost nothing, it is
  {floor:.1f} ms per new token of the dense model's {dense_ms:.1f} ms and the slim one's {slim_ms:.1f} ms at batch 1.
  Without it the slim model would decode {without:.2f} times as fast.
- **Widths that differ by layer and are no multiple of 64** multiply a little below the rate of round ones; `--round-to
  64` or `--for vllm` asks for round ones ([planning.md](../../docs/guides/planning.md)).
"""


def floor_ms(model: Any, prompt: int, new_tokens: int, rounds: int) -> float:
    """Milliseconds per new token of the same model with matrices of almost no width: one head, 8 channels, 64 words."""
    config = type(model.config)(
        **{
            **model.config.to_dict(),
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 8,
            "vocab_size": 64,
            "per_layer_config": None,
            "auto_map": None,
        }
    )
    hollow = type(model)(config).eval()
    ids = torch.zeros(1, prompt, dtype=torch.long)
    return 1e3 * statistics.median(_decode_seconds(hollow, ids, new_tokens) for _ in range(rounds))


@torch.no_grad()
def _decode_seconds(model: Callable[..., Any], ids: torch.Tensor, new_tokens: int) -> float:
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - start) / new_tokens


def main(
    dense: str,
    slim: str,
    out: Path = Path("benchmarks/results/speed"),
    batch: str = "1,8",
    prompt: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    memory: Annotated[bool, typer.Option("--memory/--no-memory")] = True,
    ratio: Annotated[float, typer.Option(help="The share to remove where SLIM is not there.")] = 0.5,
    round_to: Annotated[int, typer.Option(help="The step of FFN widths then.")] = 32,
) -> None:
    """Time, and write OUT.json and OUT.md."""
    if not Path(slim).exists():
        cheap = {"method": "magnitude", "repair": False, "distill": "off", "evaluate": False, "device": "cpu"}
        ids = torch.arange(64).view(1, 64)
        slimgpt.prune_folder(dense, slim, ratio, ids, num_samples=1, seq_len=64, round_to=round_to, **cheap)
    batches = [int(word) for word in batch.split(",")]
    timings = time_models([dense, slim], dense, batches, prompt, new_tokens, rounds, device="cpu", memory=memory)
    model, _ = slimgpt.load(dense)
    config = model.config
    assert config.model_type in ARCHITECTURES
    floor = floor_ms(model, prompt, new_tokens, rounds)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    values = {**timings.to_json(), "floor_ms": floor, "dense": sizes}
    for row in [*values["rows"], *values["ratios"]]:
        row["model"] = Path(row["model"]).name
    values["base"] = Path(dense).name
    out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(values))


def page(values: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [
        PROSE.rstrip(),
        "",
        "| | batch | dense | slim | slim / dense | FLOPs promise | bytes promise | share of the lower |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows, protocol, sizes = values["rows"], values["protocol"], values["dense"]
    for ratio in values["ratios"]:
        size = ratio["batch"]
        one, two = [row for row in rows if row["batch"] == size]
        for title, name, unit, style in (
            ("prefill, tokens per second", "prefill", 1.0, ",.0f"),
            ("decode, tokens per second", "decode", 1.0, ",.1f"),
            ("first token, ms", "first_token", 1e3, ",.0f"),
            ("peak memory, MB", "peak_memory", 1e-6, ",.0f"),
        ):
            a, b = one[name], two[name]
            promises = [ratio.get(f"{name}_{kind}") for kind in ("flops", "bytes")]
            if a and b:
                lower = min(filter(None, promises), default=None)
                share = f"{b / a / lower:.2f}" if lower else ""
                promised = " | ".join([*(f"{each:.2f}" if each else "" for each in promises), share])
                lines.append(
                    f"| {title} | {size} | {unit * a:{style}} | {unit * b:{style}} | {b / a:.2f} | {promised} |"
                )
    one, two = rows[0], rows[1]
    a, b = one["parameters"], two["parameters"]
    lines.append(f"| parameters | | {a:,} | {b:,} | {b / a:.2f} | | | |")
    head = 2.0 * sizes["vocab_size"] * sizes["hidden_size"]
    most = rows[-1]["batch"]
    # Without the weights, of four bytes, with a tied head.
    caches = [row["decode_bytes"] * most - 4 * row["parameters"] for row in rows[-2:]]
    dense_ms, slim_ms, floor = 1e3 / one["decode"], 1e3 / two["decode"], values["floor_ms"]
    lines += [
        "",
        "SmolLM2-135M-Instruct and its version with half of the decoder layers removed, "
        f"{protocol['prompt']} prompt tokens, {protocol['new_tokens']} new ones, {protocol['dtype']}, "
        f"{protocol['threads']} thread(s) of {protocol['processors']} processors, medians of {protocol['rounds']} "
        "rounds; `benchmarks/speed.py` wrote this page." + (QUANTISED if values["base"] == assets.DEMO else ""),
    ]
    gap = GAP.format(
        vocab=sizes["vocab_size"],
        hidden=sizes["hidden_size"],
        head_share=head / one["decode_flops"],
        slim_head_share=head / two["decode_flops"],
        batch=most,
        prompt=protocol["prompt"],
        cache_share=caches[1] / (4 * b + caches[1]),
        removed=1 - caches[1] / caches[0],
        layers=sizes["num_hidden_layers"],
        floor=floor,
        dense_ms=dense_ms,
        slim_ms=slim_ms,
        without=(dense_ms - floor) / max(slim_ms - floor, 1e-9),
    )
    return "\n".join(lines) + "\n" + gap


if __name__ == "__main__":
    typer.run(main)
