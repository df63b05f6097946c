"""Equal layers for an engine that builds models from global sizes, such as vLLM; the folder needs no flag."""

import sys

from transformers import AutoModelForCausalLM

import slimgpt

name, output, text = sys.argv[1:]
slimgpt.prune_folder(name, output, ratio=0.25, calibration=text, uniform=True, num_samples=32, seq_len=256)
print(AutoModelForCausalLM.from_pretrained(output).config)
print(f"now: vllm serve {output}")
