"""Prune a model in memory, look at the report, save it, and write with it."""

import sys

import slimgpt

name, output = sys.argv[1:]  # a hub id, a folder, a .gguf file or "demo"; the folder to write
model, tokenizer = slimgpt.load(name)
report = slimgpt.prune(model, tokenizer, ratio=0.2, calibration="demo", num_samples=32, seq_len=512)
print(report.summary())
slimgpt.save(model, tokenizer, report, output)

inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
