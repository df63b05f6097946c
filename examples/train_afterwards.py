"""Train a slim folder towards the dense model, and compare before and after."""

import sys

import slimgpt

dense, slim, output, text = sys.argv[1:]
slimgpt.recover(slim, output, text, method="distill", teacher=dense, max_steps=100, max_length=256)
comparison = slimgpt.compare(dense, [slim, output], f"{output}-compared")
print(comparison)
