"""Prune on text of your own, folder to folder, and measure what was lost on other text."""

import sys

import slimgpt

name, output, text, other = sys.argv[1:]  # MODEL OUT and two files: calibration, evaluation
slimgpt.prune_folder(name, output, ratio=0.3, calibration=text, num_samples=32, seq_len=256)

dense, tokenizer = slimgpt.load(name)
slim, _ = slimgpt.load(output)
lost = slimgpt.evaluate(slim, tokenizer, other, window=256, max_tokens=8192, against=dense)
print(f"perplexity {lost.perplexity:.2f}, KL {lost.divergence.kl.mean:.3f} nats per token")
