"""How much faster a slim model is than its dense one, beside what its FLOPs and its bytes promise.

    python benchmarks/speed.py DENSE SLIM --out docs/speed --batch 1,8 --prompt 512 --new-tokens 128

Both are timed in turn in one run, as `slimgpt speed SLIM --against DENSE` does it; the parts of a forward pass that no
pruning of layers makes smaller are timed alone. It writes OUT.json and OUT.md.
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
from slimgpt.comparison import time_models
from slimgpt.models.families import ARCHITECTURES

PROSE = """# How fast is a slim model?

`slimgpt speed SLIM --against DENSE` times both models in turn within every round, so that a drift of the machine meets
them alike; prompts are random tokens from a fixed seed, medians of the rounds count. Peak memory is that of a fresh
process that loads the folder with plain transformers and generates. On a GPU the same command applies; none was at
hand for these figures.

"""

GAP = """
## What stands between FLOPs and speed

- **The output matrix** ({vocab:,} x {hidden:,}) and the embedding stay as they are: {head_share:.0%} of the dense
  model's FLOPs per new token, {slim_head_share:.0%} of the slim one's. The ratio of FLOPs above has that in it already.
- **Decoding reads every weight once per token** at batch 1: its bound is the ratio of bytes, {bytes:.2f}, not that of
  FLOPs. A larger batch moves it towards FLOPs.
- **What every layer costs whatever its width**: {layers} times two norms, rotary positions, cache updates, and the
  calls from Python. Timed alone, as a model of the same depth whose matrices are cut to almost nothing, it is
  {floor:.1f} ms per new token of the dense model's {dense_ms:.1f} ms and the slim one's {slim_ms:.1f} ms at batch 1.
  Without it the slim model would decode {without:.2f} times as fast.
- **Widths that differ by layer and are no multiple of 64** multiply a little below the rate of round ones; `--round-to
  64` or `--for vllm` asks for round ones ([planning.md](planning.md)).
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
    out: Path = Path("docs/speed"),
    batch: str = "1,8",
    prompt: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    memory: Annotated[bool, typer.Option("--memory/--no-memory")] = True,
) -> None:
    """Time, and write OUT.json and OUT.md."""
    batches = [int(word) for word in batch.split(",")]
    found = time_models([dense, slim], dense, batches, prompt, new_tokens, rounds, "cpu", memory=memory)
    model, _ = slimgpt.load(dense)
    config = model.config
    assert config.model_type in ARCHITECTURES
    floor = floor_ms(model, prompt, new_tokens, rounds)
    values = {**found.to_json(), "floor_ms": floor}
    for row in [*values["rows"], *values["ratios"]]:
        row["model"] = Path(row["model"]).name
    values["base"] = Path(dense).name
    out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    lines = [
        PROSE.rstrip(),
        "",
        "| | batch | dense | slim | slim / dense | FLOPs promise |",
        "|---|---|---|---|---|---|",
    ]
    ratios = {ratio["batch"]: ratio for ratio in values["ratios"]}
    for size in batches:
        one, two = [row for row in found.rows if row.batch == size]
        for name, title, style, promise in (
            ("prefill", "prefill, tokens per second", ",.0f", "prefill_flops"),
            ("decode", "decode, tokens per second", ",.1f", "decode_flops"),
        ):
            a, b = getattr(one, name), getattr(two, name)
            lines.append(
                f"| {title} | {size} | {a:{style}} | {b:{style}} | {b / a:.2f} | {ratios[size][promise]:.2f} |"
            )
        a, b = one.first_token, two.first_token
        lines.append(f"| first token, ms | {size} | {1e3 * a:,.0f} | {1e3 * b:,.0f} | {b / a:.2f} | |")
        if one.peak_memory and two.peak_memory:
            a, b = one.peak_memory, two.peak_memory
            lines.append(f"| peak memory, MB | {size} | {a / 1e6:,.0f} | {b / 1e6:,.0f} | {b / a:.2f} | |")
    one, two = found.rows[0], found.rows[1]
    a, b = one.bytes, two.bytes
    lines.append(f"| bytes on disk | | {a:,} | {b:,} | {b / a:.2f} | |")
    protocol = found.protocol
    lines += [
        "",
        f"SmolLM2-135M-Instruct and its version with half of the decoder layers removed, {prompt} prompt tokens, "
        f"{new_tokens} new ones, {protocol['dtype']}, {protocol['threads']} thread(s) of {protocol['processors']} "
        f"processors, medians of {rounds} rounds; `benchmarks/speed.py` wrote this page.",
    ]
    head = 2.0 * config.vocab_size * config.hidden_size
    dense_ms, slim_ms = 1e3 / one.decode, 1e3 / two.decode
    text = (
        "\n".join(lines)
        + "\n"
        + GAP.format(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            head_share=head / one.decode_flops,
            slim_head_share=head / two.decode_flops,
            bytes=one.bytes / two.bytes,
            layers=config.num_hidden_layers,
            floor=floor,
            dense_ms=dense_ms,
            slim_ms=slim_ms,
            without=(dense_ms - floor) / max(slim_ms - floor, 1e-9),
        )
    )
    out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    typer.run(main)
