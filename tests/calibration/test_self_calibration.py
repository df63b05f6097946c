"""Text that the model writes itself: its filter, its packing, the seeds, a resumed run, the report."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import slimgpt
from slimgpt.calibration.batch_generation import (
    Start,
    TurnTokens,
    folded_attention,
    generate_documents,
    parameters_moved,
)
from slimgpt.calibration.generation_limits import fits_whole, writing_dtype
from slimgpt.calibration.openings import OPENINGS, OTHER_LANGUAGES
from slimgpt.calibration.repetition import SeenText, before_the_loop, repeated_share
from slimgpt.calibration.self_calibration import Writer, pack, write_calibration
from slimgpt.calibration.starts import Starts, passages, separator
from slimgpt.calibration.template_tokens import turn_tokens
from slimgpt.calibration.windows import digest
from slimgpt.errors import CalibrationError, NumericalError, ResumeError
from slimgpt.layerwise.on_demand import on_demand
from slimgpt.models.build import decoder_layers
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.sampling import draw
from slimgpt.pipeline import prepare, self_written
from slimgpt.runtime.distributed import ALONE
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import tiny_model

CPU = torch.device("cpu")
OPTIONS = {
    "ratio": 0.3, "num_samples": 12, "seq_len": 48, "device": "cpu", "batch_size": 3, "forward_dtype": "float32",
}  # fmt: skip
IDS = st.lists(st.integers(0, 5), max_size=60)

TEMPLATE = (
    "{% for message in messages %}{{ '<start>' + message['role'] + ' ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template."""
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<start>"]})
    chatty.chat_template = TEMPLATE
    return chatty


def written(model, tokenizer, num_samples=6, seq_len=40, seed=0, **more):
    return write_calibration(model, tokenizer, num_samples, seq_len, seed, device=CPU, dtype=torch.float32, **more)


# The filter


@given(IDS, st.integers(1, 6))
def test_repeated_share_counts_runs_that_stood_before(ids, n):
    before, again, runs = [], 0, range(len(ids) - n + 1)
    for start in runs:
        again += ids[start : start + n] in before
        before.append(ids[start : start + n])
    assert repeated_share(ids, n) == pytest.approx(again / len(runs) if runs else 0.0)


@given(IDS, st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.25, 0.5]))
def test_before_the_loop_is_the_longest_beginning_within_the_share(ids, n, most):
    fit = [count for count in range(len(ids) + 1) if repeated_share(ids[:count], n) <= most]
    assert before_the_loop(ids, n, most) == max(fit)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=8), st.integers(5, 20))
def test_a_loop_is_cut_and_text_without_one_is_not(motif, times):
    unlike = list(range(100, 160))
    assert before_the_loop(unlike) == len(unlike)
    assert before_the_loop(unlike + motif * times * 4) < len(unlike) + 4 * len(motif) + len(unlike) // 2


@given(IDS, IDS)
def test_shared_share_is_that_of_runs_in_documents_before(one, other):
    seen = SeenText(3)
    assert seen.shared_share(one) == 0
    seen.add(one)
    runs = {tuple(one[start : start + 3]) for start in range(len(one) - 2)}
    mine = [tuple(other[start : start + 3]) for start in range(len(other) - 2)]
    assert seen.shared_share(other) == pytest.approx(sum(run in runs for run in mine) / len(mine) if mine else 0)
    assert seen.shared_share(one) == (1 if runs else 0)


# Packing


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=30),
    st.lists(st.integers(0, 9), max_size=2),
    st.integers(1, 5),
    st.integers(3, 12),
)
def test_windows_hold_the_documents_in_a_row(documents, prefix, num_samples, seq_len):
    flat = [token for document in documents for token in document]
    body = seq_len - len(prefix)
    if len(flat) < num_samples * body:
        with pytest.raises(CalibrationError, match="do not fill"):
            pack(documents, prefix, num_samples, seq_len)
        return
    windows = pack(documents, prefix, num_samples, seq_len)
    assert windows.shape == (num_samples, seq_len)
    assert windows[:, : len(prefix)].tolist() == [prefix] * num_samples
    assert windows[:, len(prefix) :].flatten().tolist() == flat[: num_samples * body]


# Generation


class FollowingModel(torch.nn.Module):
    """A stand-in that predicts the next token to be one more than the last, with certainty."""

    def __init__(self, size: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(size, 2)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **_):
        size = self.embedding.num_embeddings
        logits = torch.full((*input_ids.shape, size), -1e4)
        return {"logits": logits.scatter(-1, ((input_ids + 1) % size)[..., None], 0.0)}


def test_the_template_is_put_in_where_the_question_ends():
    turns = TurnTokens((90, 50), (91, 92, 70), (91,))
    starts = [Start("chat", turns.before, 1.0), Start("text", (60,), 1.0), Start("text", (5,), 1.0)]
    special = frozenset({58, 90, 91, 92, 85})
    chat, text, long = generate_documents(
        FollowingModel(100), starts, torch.full((3, 40), 0.5), special=special, turns=turns
    )
    assert chat.ids == [90, 50, *range(51, 58), 91, 92, 70, *range(71, 85)]
    assert text.ids == list(range(60, 85))
    assert chat.ended
    assert text.ended
    assert long.ids == list(range(5, 45))  # 40 tokens: the limit
    assert not long.ended
    assert (chat.own, text.own, long.own) == (7 + 14, 24, 39)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_generated_tokens_are_those_of_transformers(family):
    """At temperature near 0, rows of different length of life are what transformers' own greedy search gives."""
    model = tiny_model(family).eval()
    starts = [Start("text", (first, 3), 1e-4) for first in range(5, 17)]
    plain = generate_documents(model, starts, torch.full((12, 24), 0.5), special=frozenset())
    for start, document in zip(starts, plain):
        expected = model.generate(
            torch.tensor([start.tokens]), max_length=24, min_length=24, do_sample=False, eos_token_id=None
        )
        assert document.ids == expected[0].tolist()
    # With ends, most rows leave early: the others must go on as they would have.
    special = frozenset({plain[0].ids[20], plain[3].ids[19], plain[7].ids[21]})
    for document, whole in zip(generate_documents(model, starts, torch.full((12, 24), 0.5), special=special), plain):
        free = next((place for place in range(18, 24) if whole.ids[place] in special), 24)
        assert document.ids[:18] == whole.ids[:18] or set(whole.ids[2:18]) & special
        if not set(whole.ids[2:24]) & special:
            assert document.ids == whole.ids
        elif not set(whole.ids[2:18]) & special:
            assert document.ids == whole.ids[:free]


def test_samples_follow_the_predictions():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20000, -1)
    uniforms = (torch.arange(20000) + 0.5) / 20000
    counts = torch.bincount(draw(logits, uniforms), minlength=4) / 20000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=1e-4, rtol=0)
    with pytest.raises(NumericalError, match="NaN"):
        draw(logits[:2] * float("nan"), uniforms[:2])


def test_folded_attention_is_that_of_transformers():
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query = torch.randn(2, 6, 1, 8, generator=torch.Generator().manual_seed(0))
    key, value = (torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    expected = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)[0]
    torch.testing.assert_close(folded_attention(module, query, key, value, None, scaling=0.3)[0], expected)


def test_a_moved_model_is_as_before():
    model = tiny_model("llama")
    before = {name: (tensor, tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    with parameters_moved(model, CPU, torch.bfloat16):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} <= {torch.float32}
    for name, tensor in model.state_dict().items():
        old, address, dtype = before[name]
        assert (tensor.data_ptr(), tensor.dtype) == (address, dtype)
        assert torch.equal(tensor, old)


# What is written


def test_turns_are_those_of_the_template(chatting, tokenizer):
    turns = turn_tokens(chatting)
    conversation = [{"role": "user", "content": "She counted"}, {"role": "assistant", "content": "the heads"}]
    whole = chatting.apply_chat_template(conversation, tokenize=False)
    parts = [chatting.decode(part) for part in (turns.before, turns.between, turns.behind)]
    assert whole == f"{parts[0]}She counted{parts[1]}the heads{parts[2]}"
    assert turn_tokens(tokenizer) is None
    shouting = copy.deepcopy(chatting)
    shouting.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert turn_tokens(shouting) is None


def test_half_is_chat_where_there_is_a_template(chatting, tokenizer):
    model = tiny_model("llama")
    starts = Writer(model, chatting, 64, 0).starts(0, 64)
    assert [start.kind for start in starts[:4]] == ["chat", "text", "chat", "text"]
    turns = turn_tokens(chatting)
    assert all(start.tokens[: len(turns.before)] == turns.before for start in starts[::2])
    plain = Writer(model, tokenizer, 40, 0).starts(0, 64)
    assert {start.kind for start in plain} == {"text"}
    assert any(start.tokens == (tokenizer.eos_token_id,) for start in plain)
    assert len({start.tokens for start in plain}) > 20
    assert Writer(model, tokenizer, 40, 0).starts(0, 64) == plain != Writer(model, tokenizer, 40, 1).starts(0, 64)


def test_openings_are_apart():
    texts = [text for group in (*OPENINGS.values(), *OTHER_LANGUAGES.values()) for text in group]
    assert len(texts) == len(set(texts)) > 100
    assert len(passages()) == len(set(passages())) > 100
    assert all(20 <= len(passage.split()) <= 60 or "\n" in passage for passage in passages())


def test_an_opening_comes_again_only_when_all_have_come(chatting):
    starts = Starts(chatting, [], None, 200, 0)
    beginnings = {(*starts.begin, *starts.ids(passage))[:200] for passage in passages()}
    assert len(beginnings) == len(passages())
    once = len(passages()) * 3 // 2  # two of three texts begin with a passage; other languages take the place of some
    drawn = [start.tokens for start in starts(0, once) if start.tokens in beginnings]
    assert len(set(drawn)) == len(drawn) > len(passages()) // 2
    assert starts(0, 40)[20:] != starts(20, 20)  # another draw of languages, the same order of passages
    assert len({start.tokens for start in starts(0, 2000)}) > 200


def test_texts_begin_where_pretraining_divides_documents(chatting, tokenizer):
    parted = copy.deepcopy(chatting)
    parted.add_special_tokens({"additional_special_tokens": ["<start>", "<|endoftext|>"]})
    model = tiny_model("llama")
    model.resize_token_embeddings(len(parted))
    writer = Writer(model.eval(), parted, 64, 0)
    number = parted.convert_tokens_to_ids("<|endoftext|>")
    texts = [start for start in writer.starts(0, 16) if start.kind == "text"]
    assert {start.tokens[0] for start in texts} == {number}
    for document in writer.round(0, 8, 8, None, ALONE):
        finished = writer.finished(document, len(document.ids))
        assert number not in finished  # it is no part of the window
        if document.start.kind == "text":
            assert tuple(finished[: len(document.start.tokens) - 1]) == document.start.tokens[1:]
    assert separator(tokenizer) == tokenizer.eos_token_id


def test_a_separator_without_a_row_in_the_embedding_is_not_used(tokenizer):
    """transformers adds one to the tokenizers of GGUF files."""
    parted = copy.deepcopy(tokenizer)
    parted.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    model = tiny_model("llama").eval()
    assert parted.convert_tokens_to_ids("<|endoftext|>") == len(model.get_input_embeddings().weight)
    writer = Writer(model, parted, 64, 0)
    assert writer.starts.begin == (tokenizer.eos_token_id,)
    assert writer.round(0, 2, 2, None, ALONE)


def test_a_seed_decides_the_text(chatting):
    model = tiny_model("llama").train()
    write = in_eval_mode(written)
    one, again, other = (write(model, chatting, 6, 64, seed) for seed in (0, 0, 1))
    assert model.training
    assert torch.equal(one.windows, again.windows)
    assert not torch.equal(one.windows, other.windows)
    assert one.windows.shape == (6, 64)
    assert one.info["sha256"] == digest(one.windows)
    assert one.info["documents"]["chat"] > 0
    assert one.info["documents"]["text"] > 0


def test_held_out_text_follows_the_windows(tokenizer):
    model = tiny_model("llama").eval()
    longer, shorter = written(model, tokenizer, 8, 40), written(model, tokenizer, 6, 40, held_out=60)
    flat = longer.windows.flatten().tolist()
    assert shorter.windows.flatten().tolist() == flat[: 6 * 40]
    assert shorter.held_out.tolist() == flat[6 * 40 : 6 * 40 + 60]
    assert len(longer.held_out) == 0


@pytest.fixture
def short_rounds():
    """Rounds of 8 documents."""
    with other_thresholds(generation_round=8):
        yield


@pytest.mark.usefixtures("short_rounds")
def test_rounds_that_are_kept_are_not_written_again(tokenizer, tmp_path):
    model, kept = tiny_model("llama").eval(), self_written.KeptRounds(tmp_path / "rounds")
    whole = written(model, tokenizer, 24, rounds=kept)
    files = sorted((tmp_path / "rounds").glob("*.json"))
    assert len(files) > 2
    last = files[-1].read_bytes()
    for file in files[2:]:
        file.unlink()
    steps = []
    resumed = written(model, tokenizer, 24, rounds=kept, on_written=lambda *step: steps.append(step))
    assert torch.equal(resumed.windows, whole.windows)
    assert json.loads(files[-1].read_bytes())["documents"] == json.loads(last)["documents"]
    assert {**resumed.info, "seconds": 0} == {**whole.info, "seconds": 0}
    assert steps[0][0] == 2 * 39  # two rounds of 39 steps are behind it
    steps.clear()
    written(model, tokenizer, 24, rounds=kept, on_written=lambda *step: steps.append(step))
    assert steps == []
    files[0].write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        written(model, tokenizer, 24, rounds=kept)


def test_a_model_that_only_repeats_itself_is_refused(tokenizer):
    model = tiny_model("llama").eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.weight[7] = 50 * torch.sign(model.model.norm.weight)
    model.model.norm.weight.data.abs_()
    model.lm_head.bias = torch.nn.Parameter(
        torch.zeros(model.lm_head.out_features).index_fill(0, torch.tensor([7]), 1e4)
    )
    with pytest.raises(CalibrationError, match=r"fit for\s+calibration.*give text with --calibration FILE"):
        written(model, tokenizer)


def test_a_model_that_does_not_fit_is_told_of_with_the_fix():
    with pytest.warns(
        UserWarning, match=r"needs about 1[.\d]* GB on cpu .* layer by layer.*--calibration FILE.*--memory"
    ):
        assert not fits_whole(10**9, 1, CPU, 10**8, "big")
    assert fits_whole(1000, 4, CPU, None, "small")


@pytest.mark.parametrize("resident", [10**12, 0], ids=["layers stay", "no layer stays"])
def test_layer_by_layer_the_same_is_written_as_in_one_piece(tokenizer, resident):
    model = tiny_model("llama").eval()
    layers, loaded = list(decoder_layers(model)), []

    def load(index):
        loaded.append(index)
        return layers[index]

    plain = written(model, tokenizer)
    assert torch.equal(written(model, tokenizer, placed=on_demand(load, resident)).windows, plain.windows)
    assert list(decoder_layers(model)) == layers
    assert (len(loaded) > 5 * len(layers)) == (resident == 0)


def test_a_model_that_does_not_fit_is_pruned_on_text_of_its_own(dense_folder, tmp_path, monkeypatch):
    plain = slimgpt.prune_folder(str(dense_folder), tmp_path / "plain", **OPTIONS)
    monkeypatch.setattr(prepare, "fits_whole", lambda *_: False)
    monkeypatch.setattr(self_written, "load_model", None)  # calling it would fail
    streamed = slimgpt.prune_folder(str(dense_folder), tmp_path / "streamed", **OPTIONS)
    assert streamed.calibration["sha256"] == plain.calibration["sha256"]
    assert [layer.kept for layer in streamed.layers] == [layer.kept for layer in plain.layers]


def test_the_type_asked_for_is_taken():
    assert writing_dtype("float16", torch.float32, CPU) is torch.float16
    assert writing_dtype("auto", torch.float32, CPU) in (torch.float32, torch.bfloat16)
    assert writing_dtype("auto", torch.float16, torch.device("meta")) is torch.float16


# In runs


def test_auto_is_the_default_in_memory_and_to_a_folder(dense_folder, tmp_path):
    model, tokenizer = slimgpt.load(str(dense_folder))
    steps = []
    report = slimgpt.prune(model, tokenizer, on_rehearsed=lambda *step: steps.append(step[0]), **OPTIONS)
    slimgpt.save(model, tokenizer, report, tmp_path / "whole")
    folder = slimgpt.prune_folder(str(dense_folder), tmp_path / "streamed", **OPTIONS)
    for each in (report, folder):
        assert each.calibration["source"] == "auto"
        assert each.calibration["self_written"]["sha256"] == each.calibration["sha256"]
        assert (each.calibration["num_samples"], each.calibration["seq_len"]) == (12, 48)
        assert each.divergence["held_out"]["tokens"] > 0
    assert folder.calibration["sha256"] == report.calibration["sha256"]
    assert "writing text" in steps
    assert "--calibration auto" in (tmp_path / "streamed" / "README.md").read_text()


@pytest.mark.usefixtures("short_rounds")
def test_a_run_killed_while_writing_or_after_goes_on_to_the_same(dense_folder, tmp_path):
    plain = slimgpt.prune_folder(str(dense_folder), tmp_path / "plain", **OPTIONS)

    class Killed(BaseException):
        pass

    def kill(_stage, step, *_):
        if step > 50:  # in the second round
            raise Killed

    with pytest.raises(Killed):
        slimgpt.prune_folder(str(dense_folder), tmp_path / "out", on_rehearsed=kill, **OPTIONS)
    kept = tmp_path / ".out.unfinished" / "self-calibration"
    assert [file.name for file in kept.iterdir()] == ["00000.json"]
    with pytest.raises(ResumeError, match="--resume"):
        slimgpt.prune_folder(str(dense_folder), tmp_path / "out", **OPTIONS)
    with pytest.raises(ResumeError, match="seed"):
        slimgpt.prune_folder(str(dense_folder), tmp_path / "out", resume=True, seed=1, **OPTIONS)

    def kill_layer(*_):
        raise Killed

    with pytest.raises(Killed):
        slimgpt.prune_folder(str(dense_folder), tmp_path / "out", resume=True, on_layer=kill_layer, **OPTIONS)
    steps = []
    resumed = slimgpt.prune_folder(
        str(dense_folder), tmp_path / "out", resume=True, on_rehearsed=lambda *step: steps.append(step), **OPTIONS
    )
    assert steps == []
    assert resumed.calibration["sha256"] == plain.calibration["sha256"]
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not kept.parent.exists()


def test_without_a_tokenizer_auto_is_refused():
    with pytest.raises(CalibrationError, match="cannot write its calibration text"):
        slimgpt.prune(tiny_model("llama"), None, device="cpu")
