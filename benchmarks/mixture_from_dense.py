"""A mixture of experts that behaves, made from a dense model: no published one is small enough for a laptop.

    python benchmarks/mixture_from_dense.py --data data --out runs/mixture/model --minutes 38

Every FFN of SmolLM2-135M is divided: the channels with the most energy become a shared expert, the others are
clustered by when they are active (k-means with clusters of one size) into experts, as in MoEfication (Zhang et al.,
arXiv 2110.01786) and LLaMA-MoE (Zhu et al., arXiv 2406.16554). A router begins with the least-squares prediction of the
log of what every expert puts out. Then all FFNs are fitted to the dense ones' outputs on the dense model's own inputs,
layer by layer, and for the rest of the time router and experts are trained to predict as the dense model does (the KL
divergence, on C4 text). The result is an ordinary Qwen2-MoE folder; `mixture.json` in it says how near it came.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from quality_table.texts import Texts
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

import slimgpt
from slimgpt.runtime.versions import versions

TRAINED_DOCUMENTS = 500
"""Of the documents that may be calibrated on; pruning calibrates on the others."""

SEQ_LEN = 256
ROUTER_SPREAD = 0.5
"""Standard deviation of the router's logits at first: its weights then begin near 1 / k."""

LAYERWISE_SHARE = 0.6
"""Share of the time for the fit layer by layer, which brings most for its cost."""

ROUTER_RATE, EXPERT_RATE = 2e-4, 5e-5
"""Learning rates of the whole mixture's training; with 1e-3 and 2.5e-4 the first steps undo the fit."""


def empty_mixture(dense: PreTrainedModel, experts: int, per_token: int, width: int) -> PreTrainedModel:
    """The mixture with the dense model's attention, norms and embeddings, and experts that are still to be filled."""
    old = dense.config
    config = Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=old.intermediate_size - experts * width,
        num_experts=experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=True,
        qkv_bias=False,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        dtype="float32",
    )
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    missing, _ = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in missing), missing
    return model


@torch.no_grad()
def balanced_clusters(features: Tensor, clusters: int, seed: int, rounds: int = 6) -> Tensor:
    """k-means with clusters of one size: the rows of ``features`` in each, ``(clusters, rows / clusters)``."""
    size = len(features) // clusters
    generator = torch.Generator().manual_seed(seed)
    centres = features[torch.randperm(len(features), generator=generator)[:clusters]]
    rows = torch.arange(0)
    for _ in range(rounds):
        distances = torch.cdist(features, centres)
        owner = linear_sum_assignment(distances.repeat_interleave(size, dim=1).numpy())[1] // size
        rows = torch.stack([torch.from_numpy(np.flatnonzero(owner == c)) for c in range(clusters)])
        centres = features[rows].mean(1)
    return rows


@torch.no_grad()
def split_ffn(dense: Any, block: Any, inputs: Tensor, seed: int) -> None:
    """Fill a mixture's block from a dense FFN, judged on the FFN's ``inputs``, ``(tokens, hidden)``."""
    experts, width = block.experts.num_experts, block.experts.intermediate_dim
    hidden = F.silu(dense.gate_proj(inputs)) * dense.up_proj(inputs)  # (tokens, channels)
    strength = hidden.abs() * dense.down_proj.weight.norm(dim=0)
    order = strength.square().mean(0).argsort(descending=True)
    shared, rest = order[: len(order) - experts * width], order[len(order) - experts * width :]
    profile = strength[:, rest].T.sqrt()
    profile = F.normalize(profile - profile.mean(1, keepdim=True), dim=1)
    generator = torch.Generator().manual_seed(seed)
    features = profile @ torch.randn(profile.shape[1], 96, generator=generator) / math.sqrt(96)
    groups = rest[balanced_clusters(features, experts, seed)]
    gate, up, down = (getattr(dense, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    block.shared_expert.gate_proj.weight.copy_(gate[shared])
    block.shared_expert.up_proj.weight.copy_(up[shared])
    block.shared_expert.down_proj.weight.copy_(2 * down[:, shared])  # its gate is the sigmoid of 0 at first
    block.shared_expert_gate.weight.zero_()
    block.experts.gate_up_proj.copy_(torch.stack([torch.cat([gate[rows], up[rows]]) for rows in groups]))
    block.experts.down_proj.copy_(torch.stack([down[:, rows] for rows in groups]) * block.gate.top_k)
    energy = torch.stack([(hidden[:, rows] @ down[:, rows].T).norm(dim=1) for rows in groups], 1)  # (tokens, experts)
    logs = energy.clamp_min(1e-9).log()
    logs -= logs.mean(1, keepdim=True)
    moments = inputs.T @ inputs
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    weight = torch.linalg.solve(moments, inputs.T @ logs).T
    block.gate.weight.copy_(weight * ROUTER_SPREAD / (inputs @ weight.T).std())


@torch.no_grad()
def ffn_inputs_and_outputs(dense: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What every dense FFN reads and gives for some windows, ``(tokens, hidden)`` each, in bfloat16."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].flatten(0, 1).bfloat16())
        outputs.append(output.flatten(0, 1).bfloat16())

    handles = [layer.mlp.register_forward_hook(note) for layer in dense.model.layers]
    batches = []
    for part in ids.split(4):
        dense.model(part)
        batches.append((inputs[:], outputs[:]))
        inputs.clear()
        outputs.clear()
    for handle in handles:
        handle.remove()
    return tuple([torch.cat(parts) for parts in zip(*side)] for side in zip(*batches))  # type: ignore[return-value]


def parts(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The routers' parameters, and those of the experts."""
    blocks = [layer.mlp for layer in model.model.layers]
    routers = [p for block in blocks for p in (*block.gate.parameters(), *block.shared_expert_gate.parameters())]
    experts = [p for block in blocks for p in (*block.experts.parameters(), *block.shared_expert.parameters())]
    return routers, experts


def fit_layers(mixture: PreTrainedModel, inputs: list[Tensor], outputs: list[Tensor], deadline: float) -> list[float]:
    """Fit every block to the dense FFN; the relative squared errors on the last eighth of the tokens, by layer."""
    errors = []
    for index, layer in enumerate(mixture.model.layers):
        block, x, y = layer.mlp, inputs[index].float(), outputs[index].float()
        held = len(x) // 8
        left = max(deadline - time.perf_counter(), 1.0) / (len(inputs) - index)
        start, step = time.perf_counter(), 0
        groups = [
            {"params": [*block.gate.parameters(), *block.shared_expert_gate.parameters()], "rate": 2e-3},
            {"params": [*block.experts.parameters(), *block.shared_expert.parameters()], "rate": 4e-4},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        generator = torch.Generator().manual_seed(index)
        while (done := (time.perf_counter() - start) / left) < 1:
            rows = torch.randint(len(x) - held, (512,), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, (step + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * done))
            with torch.autocast("cpu", torch.bfloat16):
                result = block(x[rows][None])[0]
            loss = (result.float() - y[rows]).square().sum() / y[rows].square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            lost = (block(x[-held:][None])[0] - y[-held:]).square().sum() / y[-held:].square().sum()
        errors.append(float(lost))
        print(f"layer {index}: {step} steps, relative error {errors[-1]:.4f}", flush=True)
    return errors


def distill(
    dense: PreTrainedModel, mixture: PreTrainedModel, batches: Iterator[Tensor], deadline: float
) -> list[float]:
    """Train router and experts towards the dense model's predictions until the time is up; the KL of every step."""
    routers, experts = parts(mixture)
    groups = [{"params": routers, "rate": ROUTER_RATE}, {"params": experts, "rate": EXPERT_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for parameter in mixture.parameters():
        parameter.requires_grad_(False)
    for parameter in (*routers, *experts):
        parameter.requires_grad_(True)
    start, curve = time.perf_counter(), []
    for ids in batches:
        done = (time.perf_counter() - start) / (deadline - start)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (len(curve) + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * done))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = dense(ids).logits
            logits = mixture(ids).logits
        loss = F.kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            target.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_((*routers, *experts), 1.0)
        optimizer.step()
        curve.append(float(loss))
        print(f"step {len(curve)}: KL {curve[-1]:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return curve


def windows_of(documents: list[str], tokenizer: Any, seed: int) -> Tensor:
    """All text in windows without a gap, shuffled, ``(windows, SEQ_LEN)``."""
    ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    windows = torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
    order = list(range(len(windows)))
    random.Random(seed).shuffle(order)
    return windows[order]


def main(
    data: Annotated[Path, typer.Option(help="A folder with c4 and wikitext2.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    minutes: Annotated[float, typer.Option(help="Wall time of the training, once the FFNs are divided.")] = 38.0,
    experts: int = 16,
    per_token: int = 8,
    width: int = 64,
    seed: int = 0,
) -> None:
    """Divide, fit, distil, save."""
    begun, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    dense, tokenizer = slimgpt.load("demo", dtype="float32")
    mixture = empty_mixture(dense, experts, per_token, width)
    documents = [str(text) for text in Texts(data).documents("c4")[:TRAINED_DOCUMENTS]]
    windows = windows_of(documents, tokenizer, seed)
    inputs, outputs = ffn_inputs_and_outputs(dense, windows[:64])
    for index, (old, new) in enumerate(zip(dense.model.layers, mixture.model.layers)):
        split_ffn(old.mlp, new.mlp, inputs[index][:2048].float(), seed + index)
    print(f"divided after {time.perf_counter() - begun:.0f} s", flush=True)
    start = time.perf_counter()
    errors = fit_layers(mixture, inputs, outputs, start + LAYERWISE_SHARE * 60 * minutes)
    del inputs, outputs
    mixture.save_pretrained(out)  # in case that what follows is killed
    epochs = (batch for _ in range(100) for batch in windows.split(4))
    curve = distill(dense, mixture, epochs, start + 60 * minutes)
    mixture.generation_config = dense.generation_config
    mixture.save_pretrained(out)
    tokenizer.save_pretrained(out)
    figures = {
        "experts": experts,
        "per_token": per_token,
        "width": width,
        "shared_width": mixture.config.shared_expert_intermediate_size,
        "wall_minutes": (time.perf_counter() - begun) / 60,
        "core_minutes": (time.process_time() - cpu) / 60,
        "threads": torch.get_num_threads(),
        "text_tokens": windows.numel(),
        "trained_tokens": len(curve) * 4 * SEQ_LEN,
        "layer_errors": errors,
        "kl": curve,
        "versions": versions(torch.device("cpu")),
    }
    (out / "mixture.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
