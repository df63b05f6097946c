"""Remove a quarter of a mixture's layers: half of it as whole experts, the rest as channels inside the others."""

import sys

import slimgpt

name, output, text = sys.argv[1:]
report = slimgpt.prune_folder(
    name, output, ratio=0.25, calibration=text, whole_experts=0.5, num_samples=32, seq_len=256
)
for layer in report.layers:
    if layer.experts is not None:
        print(f"layer {layer.layer}: experts {layer.experts.kept} stay")
