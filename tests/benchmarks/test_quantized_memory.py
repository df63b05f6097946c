"""A quantised checkpoint of several gigabytes, read layer by layer: memory stays near one layer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from bigger_than_memory import make_checkpoint, watch

STREAM = """
import sys
from pathlib import Path
import torch
from slimgpt.models.build import empty_model
from slimgpt.models.loading import load_config, locate
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weight_conversion import ConvertedFiles
folder = Path(sys.argv[1])
config = load_config(locate(str(folder)))
streamed = StreamedModel(config, ConvertedFiles(folder, empty_model(config)), torch.bfloat16)
streamed.check_finite()
print(sum(float(streamed.layer(i).mlp.down_proj.weight[0, 0].abs()) for i in range(config.num_hidden_layers)))
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_the_stream_of_three_gigabytes_of_fp8_stays_under_one_and_a_half(tmp_path):
    folder = tmp_path / "fp8"
    make_checkpoint(folder, 2048, 5632, 16, 4, 70, device=torch.device("cpu"), fp8=True)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 3e9
    code, peaks, _, output = watch([sys.executable, "-c", STREAM, str(folder)])
    assert code == 0, output
    assert float(output.split()[-1]) > 0
    assert peaks["RssAnon"] < 1.5e9
