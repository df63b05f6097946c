"""What must hold on a GPU; skipped without one. All other tests run there, too: `auto` takes the GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import slimgpt
from slimgpt.config import make_config
from slimgpt.evaluation import perplexity
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.in_place import prune_model
from slimgpt.runtime.memory import Placement
from slimgpt.runtime.units import parse_bytes
from slimgpt.solver import Gram
from tests.models.families import tiny_model, windows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

IDS = windows(24, 24)


def on_both(family: str, **arguments):
    """The same job on the CPU and on the GPU, in fp64: models and reports."""
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(family).double()
        results.append((model, slimgpt.prune(model, None, calibration=IDS, batch_size=3, device=device, **arguments)))
    return results


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "paper", "ratio": 0.4},
        {"method": "wanda", "ratio": 0.4},
        {"ratio": 0.4, "allocation": "sensitivity", "distill": 300},
        {"ratio": 0.4, "allocation": "schedule", "distill": 300},
    ],
    ids=lambda arguments: "-".join(str(value) for value in arguments.values()),
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_gpu_ends_where_a_cpu_does(family, arguments):
    (cpu, cpu_report), (gpu, gpu_report) = on_both(family, **arguments)
    assert [layer.kept for layer in cpu_report.layers] == [layer.kept for layer in gpu_report.layers]
    assert [layer.sizes for layer in cpu_report.layers] == [layer.sizes for layer in gpu_report.layers]
    assert next(gpu.parameters()).device.type == "cpu", "the model stays where it was"
    with torch.no_grad():
        expected, logits = cpu(IDS).logits, gpu(IDS).logits
    # A GPU solves in fp32. A training keeps its moments in bfloat16, and Adam divides by them.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3 if "distill" in arguments else 1e-5)


def test_what_the_dense_model_writes_is_trained_on_there():
    (_, cpu_report), (_, gpu_report) = on_both("llama", ratio=0.4, allocation="search", distill=900)
    expected, trained = cpu_report.distillation, gpu_report.distillation
    assert trained["written_tokens"] == expected["written_tokens"] > 0
    # Each device draws text of its own, but what is held out is the same.
    assert trained["divergence"]["before"] == pytest.approx(expected["divergence"]["before"], rel=1e-6)
    assert trained["divergence"]["after"] == pytest.approx(expected["divergence"]["after"], rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_summed_in_more(dtype):
    """Against the product of the same 16-bit numbers in fp64."""
    x = torch.randn(4096, 300, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    gram = Gram(300, torch.device("cuda"), torch.float32)
    for part in x.split(512):
        gram.add(part)
    expected = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(gram.mean().double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("stream", "kept"), [("host", "host"), ("file", "recompute"), ("device", "recompute")])
def test_where_activations_are_kept_changes_nothing(stream, kept, tmp_path):
    plain, other = tiny_model("llama").double(), tiny_model("llama").double()
    config = make_config(method="paper", ratio=0.4, batch_size=3)
    for model, placement in ((plain, Placement(10**10, "device", "device")), (other, Placement(10**10, stream, kept))):
        shape = describe(model.config, model)
        plan = plan_for(model.config, config, shape)
        for _ in prune_model(
            model, IDS, plan, config, ExecutionContext(torch.device("cuda"), placement, scratch=tmp_path)
        ):
            pass
    state = plain.state_dict()
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-12, msg=name)


BUDGET = """
import sys, json, torch, slimgpt
slimgpt.prune_folder(sys.argv[1], sys.argv[2], calibration=sys.argv[3], memory=sys.argv[4], **json.loads(sys.argv[5]),
                     ratio=0.3, num_samples=64, seq_len=64, batch_size=4, device="cuda", overwrite=True)
print(json.dumps(torch.cuda.max_memory_allocated()))
"""


@pytest.mark.parametrize(
    "arguments",
    [{"method": "paper"}, {"allocation": "sensitivity"}, {"distill": 2048}],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_gpu_is_held_to_the_budget(arguments, tmp_path, tokenizer, text_file):
    """A model of more than 340 MB on 340 MB; with all it wants it ends in the same place."""
    model = tiny_model(
        "llama",
        hidden_size=1024,
        num_hidden_layers=8,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    budget, plenty = "340MB", "4GB"
    assert size > parse_bytes(budget)
    for memory in (budget, plenty):
        command = [sys.executable, "-c", BUDGET, tmp_path / "dense", tmp_path / memory, text_file, memory]
        command.append(json.dumps(arguments))
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if memory == budget:
            assert json.loads(done.stdout.splitlines()[-1]) < parse_bytes(budget)
    small, large = (slimgpt.load(str(tmp_path / memory))[0] for memory in (budget, plenty))
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, large(IDS).logits, rtol=0, atol=5e-2)


def test_perplexity_is_the_same_there(tokenizer, text_file):
    model, text = tiny_model("llama"), text_file.read_text()
    on_cpu = perplexity(model, tokenizer, text, 64, 4096).perplexity
    on_gpu = perplexity(model.to("cuda"), tokenizer, text, 64, 4096).perplexity
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
