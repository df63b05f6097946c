"""Search the widths: it takes several times as long as the default and gives a better model of the same size."""

import sys

import slimgpt

name, output, text = sys.argv[1:]  # MODEL OUT and a text file to calibrate on
estimate = slimgpt.plan(name, ratio=0.33)
print(f"{estimate.plan.parameters:,} parameters will be left")

report = slimgpt.prune_folder(
    name, output, ratio=0.33, allocation="search", calibration=text, num_samples=32, seq_len=256, progress=True
)
print(report.summary())
