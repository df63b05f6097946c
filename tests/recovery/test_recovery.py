"""Recovery from folder to folder: what it learns, what it leaves, and how it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import NumericalError, OutputError, ResumeError, UsageError
from slimgpt.losses.distillation import predicted
from slimgpt.recovery.dataset import collect
from slimgpt.recovery.teacher_cache import TeacherCache, layer_numbers
from slimgpt.runtime.distributed import Ranks
from tests.recovery.conftest import SMALL

LAST = "model.layers.3.mlp.down_proj.weight"


def weights(folder):
    return load_file(folder / "model.safetensors")


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("method", ["lora", "full", "distill"])
def test_every_method_lowers_the_loss_and_leaves_an_ordinary_slim_folder(
    method, recover, slim_folder, dense_folder, text_file, tmp_path
):
    extra = {"teacher": str(dense_folder), "layer_weight": 1.0} if method == "distill" else {}
    recovery = recover(method=method, learning_rate=5e-3, max_steps=12, **extra)
    losses = [loss for _, loss in recovery.curve.held_out]
    assert min(losses) < losses[0] - 0.05
    assert [step for step, _ in recovery.curve.held_out] == [0, 6, 12]
    folder = recovery.folder
    assert {"recovery.json", "recovery.png", "slimgpt.json", "modeling_slim.py", "README.md"} <= set(os.listdir(folder))
    assert not (tmp_path / ".recovered.unfinished").exists()
    before, after = (json.loads((f / "slimgpt.json").read_text()) for f in (slim_folder, folder))
    assert before["recovery"] == []
    assert after["recovery"][0]["settings"]["method"] == method
    assert after["recovery"][0]["curve"]["held_out"] == [list(point) for point in recovery.curve.held_out]
    assert {**after, "recovery": [], "evaluation": {}} == before
    (measured,) = after["evaluation"]["results"]
    assert ("kl_divergence" in measured) == (method == "distill")  # else nothing tells where the base is
    assert f"it was trained (`{method}`" in (folder / "README.md").read_text()
    assert {n: t.shape for n, t in weights(folder).items()} == {n: t.shape for n, t in weights(slim_folder).items()}
    model, tokenizer = slimgpt.load(str(folder))
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    slim, _ = slimgpt.load(str(slim_folder))
    scores = [slimgpt.evaluate(m, tokenizer, str(text_file), window=24).perplexity for m in (slim, model)]
    assert scores[1] < scores[0]


def test_a_recovered_model_is_pruned_and_recovered_again_and_exported(recover, text_file, tmp_path):
    first = recover("first").folder
    small = ["--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu", "--ratio", 0.2]
    assert command("prune", first, tmp_path / "smaller", *small).exit_code == 0
    second = recover("second", slim=first).folder
    assert len(json.loads((second / "slimgpt.json").read_text())["recovery"]) == 2
    result = command("export", second, tmp_path / "padded", "--to", "padded", "--no-verify")
    assert result.exit_code == 0, result.output


def test_the_embeddings_stay_unless_asked_for(recover, slim_folder):
    name = "model.embed_tokens.weight"
    before = weights(slim_folder)
    kept = weights(recover("kept", method="full").folder)
    moved = weights(recover("moved", method="full", train_embeddings=True).folder)
    assert torch.equal(kept[name], before[name])
    assert not torch.equal(moved[name], before[name])
    assert not torch.equal(kept["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_adapters_touch_every_linear_layer_and_nothing_else(recover, slim_folder):
    before, after = weights(slim_folder), weights(recover(learning_rate=5e-3).folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


def test_accumulation_is_one_large_batch(recover):
    whole = weights(recover("whole", method="full", micro_batch=8).folder)
    parts = weights(recover("parts", method="full", micro_batch=2).folder)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(recover):
    for settings in ({"method": "full"}, {"method": "lora"}):
        plain = weights(recover(f"{settings['method']}-plain", max_steps=3, **settings).folder)
        twice = weights(
            recover(f"{settings['method']}-twice", max_steps=3, gradient_checkpointing=True, **settings).folder
        )
        for name, tensor in plain.items():
            torch.testing.assert_close(tensor, twice[name], rtol=0, atol=1e-6)


def test_a_killed_run_ends_with_the_same_weights(recover, slim_folder, text_file, tmp_path):
    """SIGKILL in the middle of an epoch and of the steps between two states; both runs see the data twice."""
    settings = {"method": "lora", "dropout": 0.2, "max_steps": 12, "evaluations": 4, "epochs": 2.0}
    whole = recover("whole", **settings)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **settings}.items() if name != "bf16"]
    words = ["recover", slim_folder, tmp_path / "killed", "--data", text_file, "--no-bf16", *options]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "slimgpt", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stdout:
            if line.startswith("training  step 8/12"):
                process.send_signal(signal.SIGKILL)
                break
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, stderr
    assert not (tmp_path / "killed").exists()
    refused = command(*words)
    assert refused.exit_code == 2
    assert "pass --resume" in " ".join(refused.stderr.split())
    with pytest.raises(ResumeError, match="settings seed was 0, now 1"):
        recover("killed", resume=True, seed=1, **settings)
    resumed = recover("killed", resume=True, **settings)
    assert (resumed.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert resumed.curve == whole.curve


@pytest.mark.parametrize("method", ["full", "distill"])
def test_an_interrupted_run_ends_with_the_same_weights(method, recover, dense_folder):
    """In this process; every weight and both moments go on, and what the teacher said is not asked again."""
    settings = {"method": method, "max_steps": 6, "evaluations": 3}
    settings |= {"teacher": str(dense_folder)} if method == "distill" else {}

    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    whole = recover("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        recover("killed", on_step=stop, **settings)
    resumed = recover("killed", resume=True, **settings)
    assert (resumed.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert resumed.curve == whole.curve


def test_a_cut_training_state_is_refused_by_its_file(recover, tmp_path):
    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"kept in .*\.cut\.unfinished; go on with --resume"):
        recover("cut", max_steps=4, evaluations=4, on_step=stop)
    whole, work = tmp_path / "whole", tmp_path / ".cut.unfinished"
    shutil.copytree(work, whole)
    state = "states/step-00000002"
    names = ("trainer_state.json", "scalars.json", "optimizer.safetensors", "trainable.safetensors", "checksums.json")
    damaged = [*(f"{state}/{name}" for name in names), "choices.json", "journal.json"]
    for name in damaged:
        for content in (
            lambda data: data[: len(data) // 2],
            lambda _: b"",
            lambda _: b"[]",
            lambda _: b"\xff\xfe",
            lambda data: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:],
        ):
            shutil.rmtree(work)
            shutil.copytree(whole, work)
            (work / name).write_bytes(content((whole / name).read_bytes()))
            with pytest.raises(
                ResumeError, match=rf"{name} is damaged .*start anew with --overwrite|differs|is another one"
            ):
                recover("cut", max_steps=4, evaluations=4, resume=True)
    shutil.rmtree(work)
    shutil.copytree(whole, work)
    assert recover("cut", max_steps=4, evaluations=4, resume=True).curve.kept > 0


def test_any_seed_of_63_bits_will_do(recover):
    large = weights(recover("large", seed=2**63 - 1, max_steps=1).folder)
    assert not torch.equal(large[LAST], weights(recover("other", seed=2**33, max_steps=1).folder)[LAST])
    for seed in (-1, 2**63):
        with pytest.raises(UsageError, match=f"seed is {seed}"):
            recover(seed=seed)


def test_rows_left_out_are_counted_in_the_record(recover, slim_folder, tmp_path):
    slim = shutil.copytree(slim_folder, tmp_path / "chatty")
    (slim / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
        "{{ message.content }} {% endfor %}"
    )

    def chat(role, question):
        answer = {"role": "assistant", "content": "the heads and the channels"}
        return {"messages": [{"role": role, "content": question}, answer]}

    rows = [chat("user", "count")] * 20 + [chat("user", "a long one " * 200)] * 3 + [chat("judge", "count")] * 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="3 rows of .* have no answer within 24 tokens"):
        folder = recover(slim=slim, data=data, max_steps=None).folder
    record = json.loads((folder / "recovery.json").read_text())
    assert record["data"]["rows_left_out"] == {"without_answer": 3, "refused": 2}


def test_a_run_killed_before_its_folder_was_written_only_writes_it(recover, monkeypatch):
    whole = recover("whole")
    monkeypatch.setattr("slimgpt.recovery.run.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recover("killed")
    monkeypatch.undo()
    seen = []
    resumed = recover("killed", resume=True, on_step=seen.append)
    assert seen == []
    assert (resumed.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_good_state(recover, tmp_path, monkeypatch):
    from slimgpt.recovery import trainer

    whole = recover("whole", max_steps=6, evaluations=1)
    real, calls = trainer.text_loss, []

    def poisoned(logits, tokens):
        calls.append(logits.requires_grad)
        factor = float("nan") if sum(calls) > 2 * 3 else 1.0  # two micro-batches per step: from step 4 on
        return real(logits, tokens) * factor

    monkeypatch.setattr(trainer, "text_loss", poisoned)
    with pytest.raises(NumericalError, match="at step 4; the state after step 3 is kept"):
        recover("bad", max_steps=6, evaluations=1)
    assert not (tmp_path / "bad").exists()
    state = tmp_path / ".bad.unfinished" / "states" / "step-00000003"
    assert all(tensor.isfinite().all() for tensor in load_file(state / "trainable.safetensors").values())
    monkeypatch.undo()
    shutil.copytree(tmp_path / ".bad.unfinished", tmp_path / ".lower.unfinished")
    gone_on = recover("bad", max_steps=6, evaluations=1, resume=True)
    assert (gone_on.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    lower = recover("lower", max_steps=6, evaluations=1, resume=True, learning_rate=1e-6)
    rates = dict(lower.curve.learning_rate)
    assert rates[3] > 1e-5 > rates[4]


def test_early_stop_keeps_the_best_weights(recover, monkeypatch):
    from slimgpt.recovery import trainer

    real = trainer.text_loss

    def script(*losses):
        """Held-out losses as given, one per evaluation; training as it is."""
        left = iter(losses)

        def scripted(logits, tokens):
            return real(logits, tokens) if logits.requires_grad else torch.tensor(next(left) * len(tokens))

        monkeypatch.setattr(trainer, "text_loss", scripted)

    settings = {"method": "full", "max_steps": 6, "evaluations": 6, "held_out": 4}
    script(5.0, 4.0, 3.0, 6.0, 3.5, 7.0, 7.0)
    stopped = recover("stopped", patience=2, **settings)
    assert dict(stopped.curve.held_out) == {0: 5.0, 1: 4.0, 2: 3.0, 3: 6.0, 4: 3.5}
    assert (stopped.curve.kept, stopped.curve.steps) == (2, 6)
    script(5.0, 4.0, 3.0, 6.0, 3.5, 7.0, 7.0)
    with monkeypatch.context() as killed:
        killed.setattr("slimgpt.recovery.run.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recover("killed", patience=2, **settings)
    assert recover("killed", patience=2, resume=True, **settings).curve == stopped.curve
    script(5.0, 4.0, 3.0, 6.0, 3.5, 7.0, 7.0)
    patient = recover("patient", patience=0, **settings)
    assert len(patient.curve.held_out) == 7
    script(7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    to_the_end = recover("end", patience=2, **settings)
    assert to_the_end.curve.kept == 6
    second, same, last = (weights(run.folder) for run in (stopped, patient, to_the_end))
    assert all(torch.equal(second[name], same[name]) for name in second)
    assert not all(torch.equal(second[name], last[name]) for name in second)


def test_teacher_cache_holds_what_the_dense_model_says(dense_folder, text_file, tmp_path):
    dense, tokenizer = slimgpt.load(str(dense_folder))
    training = collect(tokenizer, [str(text_file)], 24, 0, 10).training
    cache = TeacherCache(tmp_path / "teacher", training, 8, (2, 48))
    cache.create()
    cache.fill(dense, 4)
    cache.open("r")
    rows = cache.rows([7, 2])
    batch = torch.stack([training[7].ids, training[2].ids])
    with torch.no_grad():
        outputs = dense(batch, output_hidden_states=True)
    logits, _ = predicted(outputs.logits, batch)
    log_p, tokens = logits.log_softmax(-1).topk(8, -1)
    assert torch.equal(rows["teacher_tokens"], tokens)
    torch.testing.assert_close(rows["teacher_log_p"].float(), log_p, rtol=2e-3, atol=2e-3)
    states = torch.stack([predicted(outputs.hidden_states[n], batch)[0] for n in layer_numbers(2, 4)], 1)
    torch.testing.assert_close(rows["teacher_layers"].float(), states, rtol=1e-2, atol=1e-2)


def test_teacher_cache_goes_on_where_it_was_killed(dense_folder, text_file, tmp_path):
    dense, tokenizer = slimgpt.load(str(dense_folder))
    training = collect(tokenizer, [str(text_file)], 24, 0, 12).training

    def stop(done, _total):
        if done >= 4:
            raise KeyboardInterrupt

    whole, parts = (TeacherCache(tmp_path / name, training, 8, flush_every=1) for name in ("whole", "parts"))
    whole.create()
    whole.fill(dense, 2)
    parts.create()
    with pytest.raises(KeyboardInterrupt):
        parts.fill(dense, 2, progress=stop)
    for name in ("tokens.npy", "log_p.npy", "done-0-of-1.json"):
        with changed_byte(tmp_path / "parts" / name), pytest.raises(ResumeError, match=f"{name} is damaged"):
            parts.fill(dense, 2)
    seen = []
    parts.create()
    parts.fill(dense, 2, progress=lambda done, _total: seen.append(done))
    assert seen == [6, 8, 10, 12]
    assert np.array_equal(whole.files["log_p"], parts.files["log_p"])


@contextlib.contextmanager
def changed_byte(file):
    """One bit of a file is another one for a while, among what is written first."""
    whole = file.read_bytes()
    place = 130 if file.suffix == ".npy" else len(whole) // 2  # behind numpy's header
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    yield
    file.write_bytes(whole)


def test_changed_predictions_or_another_teacher_are_refused(recover, dense_folder, tmp_path):
    teacher = shutil.copytree(dense_folder, tmp_path / "teacher")
    settings = {"method": "distill", "teacher": str(teacher), "layer_weight": 1.0, "max_steps": 2, "evaluations": 1}
    with pytest.raises(KeyboardInterrupt):
        recover("killed", on_step=lambda _: (_ for _ in ()).throw(KeyboardInterrupt), **settings)
    for name in ("tokens.npy", "log_p.npy", "layers.npy", "complete.json"):
        file = tmp_path / ".killed.unfinished" / "teacher" / name
        with changed_byte(file), pytest.raises(ResumeError, match=f"{name} is damaged .* start anew with --overwrite"):
            recover("killed", resume=True, **settings)
    with changed_byte(teacher / "model.safetensors"), pytest.raises(ResumeError, match="teacher files"):
        recover("killed", resume=True, **settings)
    assert recover("killed", resume=True, **settings).curve.steps == 2


def test_two_shares_of_the_teacher_are_the_whole(dense_folder, text_file, tmp_path):
    dense, tokenizer = slimgpt.load(str(dense_folder))
    training = collect(tokenizer, [str(text_file)], 24, 0, 9).training
    one, two = (TeacherCache(tmp_path / name, training, 8) for name in ("one", "two"))
    one.create()
    one.fill(dense, 3)
    two.create()
    for rank in range(2):
        two.fill(dense, 3, Ranks(rank, 2))
    torch.testing.assert_close(one.rows(range(9))["teacher_log_p"], two.rows(range(9))["teacher_log_p"])


def test_processes_agree_on_their_batches_before_the_first_one_through_a_divided_teacher(
    dense_folder, text_file, tmp_path, monkeypatch
):
    """Seven examples of two processes in batches of 3: one has two batches, and the other one and an idle one."""
    dense, tokenizer = slimgpt.load(str(dense_folder))
    training = collect(tokenizer, [str(text_file)], 24, 0, 7).training
    events = []
    monkeypatch.setattr("slimgpt.recovery.teacher_cache.is_sharded", lambda _: True)
    monkeypatch.setattr(
        "slimgpt.recovery.teacher_cache.max_over_ranks", lambda _, count: events.append(f"agree {count}") or 2
    )
    dense.register_forward_pre_hook(lambda *_: events.append("forward"))
    cache = TeacherCache(tmp_path / "teacher", training, 8)
    cache.create()
    for rank in range(2):
        cache.fill(dense, 3, Ranks(rank, 2))
    assert events == ["agree 2", "forward", "forward", "agree 1", "forward", "forward"]


def test_marks_of_files_that_are_gone_are_not_believed(dense_folder, text_file, tmp_path):
    dense, tokenizer = slimgpt.load(str(dense_folder))
    training = collect(tokenizer, [str(text_file)], 24, 0, 4).training
    cache = TeacherCache(tmp_path / "teacher", training, 8)
    cache.create()
    cache.fill(dense, 2)
    cache.mark_complete()
    before = cache.rows(range(4))["teacher_log_p"].clone()
    (tmp_path / "teacher" / "log_p.npy").unlink()
    anew = TeacherCache(tmp_path / "teacher", training, 8)
    anew.create()
    assert not anew.complete
    anew.fill(dense, 2)
    assert torch.equal(anew.rows(range(4))["teacher_log_p"], before)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("method 'best' is unknown", {"method": "best"}),
        ("schedule 'step' is unknown", {"schedule": "step"}),
        ("max_steps is 0", {"max_steps": 0}),
        ("no multiple of micro_batch", {"batch_size": 6}),
        ("leave out rank", {"method": "full", "rank": 8}),
        ("has no teacher", {"teacher": "demo"}),
        ("longer than the model's context", {"max_length": 65}),
        ("learning_rate is nan", {"learning_rate": float("nan")}),
        ("dropout is 1.5", {"dropout": 1.5}),
        ("held_out is -1", {"held_out": -1}),
        ("nothing would be learned", {"method": "distill", "text_weight": 0.0, "distill_weight": 0.0}),
        ("has no setting 'rate'", {"rate": 3}),
        ("top_k is 98", {"method": "distill", "top_k": 98}),
        ("dtype 'int3' is unknown", {"dtype": "int3"}),
    ],
)
def test_bad_settings_are_refused_before_the_work(message, settings, recover, dense_folder, tmp_path):
    if settings.get("method") == "distill":
        settings = {"teacher": str(dense_folder), **settings}
    with pytest.raises(UsageError, match=message):
        recover(**settings)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_cannot_be_found_or_does_not_fit(recover, tmp_path, monkeypatch):
    from tests.models.families import tiny_model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(slimgpt.SlimGPTError, match="name the dense model with --teacher"):
        recover(method="distill")
    tiny_model("llama", vocab_size=101).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="vocab_size 101, the slim model 97"):
        recover(method="distill", teacher=str(tmp_path / "other"))


def test_without_the_optional_library_the_extra_is_named(recover, monkeypatch):
    monkeypatch.setattr("slimgpt.recovery.checks.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'slimgpt\[recover\]'"):
        recover()


def test_output_that_exists_and_a_full_disk(recover, tmp_path, monkeypatch):
    (tmp_path / "recovered").mkdir()
    (tmp_path / "recovered" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        recover()
    with pytest.raises(OutputError, match="holds no model"):
        recover(overwrite=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="GB free"):
        recover("elsewhere")


@pytest.mark.usefixtures("whole_pictures")
def test_the_command_prints_losses_and_where_it_wrote(slim_folder, text_file, tmp_path):
    small = ["--max-length", 24, "--batch-size", 8, "--max-steps", 3, "--device", "cpu", "--evaluations", 1]
    result = command("recover", slim_folder, tmp_path / "out", "--data", text_file, "--data", text_file, *small)
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    assert "step 3/3" in result.output
    values = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert values["data"]["sources"] == [str(text_file)] * 2
    picture = (tmp_path / "out" / "recovery.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
