"""Uploads: what is refused before the work, and that the bytes of the folder arrive. Nothing leaves this machine."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import OutputError, UsageError
from tests.checkpoint.hub import FakeHub, running_hub

SETTINGS = ["--ratio", "0.3", "--num-samples", "8", "--seq-len", "32", "--allocation", "schedule"]


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield hub


def contents(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def prune(dense_folder, text_file, folder, *options: str):
    command = ["prune", str(dense_folder), str(folder), "--calibration", str(text_file), *SETTINGS, *options]
    return CliRunner().invoke(app, command)


def test_a_pruned_folder_arrives_whole(hub, dense_folder, text_file, tmp_path):
    result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "slim-llama", "--private")
    assert result.exit_code == 0, result.output
    assert without_attributes(hub.files["me/slim-llama"]) == contents(tmp_path / "slim")
    assert "model.safetensors" in hub.files["me/slim-llama"]
    assert hub.private == {"me/slim-llama": True}
    assert f"{hub.endpoint}/me/slim-llama" in result.output.replace("\n", "")
    assert str(tmp_path).encode() not in b"".join(hub.files["me/slim-llama"].values())  # no path of this machine


def test_what_is_exported_beside_it_is_not_uploaded_and_the_command_says_so(hub, dense_folder, text_file, tmp_path):
    words = ["--push-to-hub", "both", "--export", "gguf", "--no-evaluate", "--distill", "off"]
    result = prune(dense_folder, text_file, tmp_path / "slim", *words)
    assert result.exit_code == 0, result.output
    assert "slim.gguf" not in hub.files["me/both"]
    assert (tmp_path / "slim.gguf").is_file()
    assert f"hf upload me/both {tmp_path / 'slim.gguf'} slim.gguf" in result.output


def test_name_and_token_are_checked_before_the_run(hub, dense_folder, text_file, tmp_path, monkeypatch):
    runs = {
        "no name": ("a//b", "no name of a repository"),
        "empty": ("", "--push-to-hub '' is no name of a repository such as me/slim"),
        "other owner": ("somebody/slim", "belongs to somebody, and the token to me, lab"),
    }
    for repository, reason in runs.values():
        result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", repository)
        assert result.exit_code == 2
        assert reason in result.output
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "lab/slim")
    assert "does not take the token" in result.output
    assert not (tmp_path / "slim").exists()
    assert not hub.files


def test_a_dry_run_makes_no_repository(hub, dense_folder, text_file, tmp_path):
    result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not hub.files
    assert {path for _, path in hub.requests} == {"/api/whoami-v2"}
    other = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "somebody/slim", "--dry-run")
    assert other.exit_code == 2


def test_a_token_that_may_only_read_is_refused(dense_folder, text_file, tmp_path, monkeypatch):
    with running_hub(role="read") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim")
    assert result.exit_code == 2
    assert "may only read" in result.output
    assert not hub.files


def test_no_token_no_network_and_offline(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim")
    assert result.exit_code == 2
    assert "needs a token, and there is none; log in with `hf auth login`" in result.output
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    result = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim")
    assert result.exit_code == 2
    assert "the hub cannot be reached for --push-to-hub me/slim" in result.output
    assert not (tmp_path / "slim").exists()


def test_a_repository_with_files_is_replaced_only_when_asked(hub, dense_folder, text_file, tmp_path):
    hub.files["me/slim"] = {"model-00002-of-00002.safetensors": b"old", "README.md": b"old"}
    first = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim")
    assert first.exit_code == 2
    assert "holds README.md already" in first.output
    second = prune(dense_folder, text_file, tmp_path / "slim", "--push-to-hub", "me/slim", "--overwrite")
    assert second.exit_code == 0, second.output
    assert without_attributes(hub.files["me/slim"]) == contents(tmp_path / "slim")  # no shard of the old model


def test_private_alone_means_nothing(dense_folder, text_file, tmp_path):
    result = prune(dense_folder, text_file, tmp_path / "slim", "--private")
    assert result.exit_code == 2
    assert "--push-to-hub" in result.output


def test_nothing_is_asked_of_the_hub_without_the_option(hub, dense_folder, text_file, tmp_path):
    assert prune(dense_folder, text_file, tmp_path / "slim").exit_code == 0
    assert not hub.requests


def test_python_prunes_exports_and_recovers_into_repositories(hub, dense_folder, text_file, tmp_path):
    slim, text = tmp_path / "slim", str(text_file)
    settings = {"num_samples": 8, "seq_len": 32, "allocation": "schedule"}
    slimgpt.prune_folder(str(dense_folder), slim, 0.3, text, push_to_hub="me/slim", **settings)
    assert without_attributes(hub.files["me/slim"]) == contents(slim)
    slimgpt.export(slim, tmp_path / "padded", "padded", push_to_hub="lab/padded", check=False)
    assert without_attributes(hub.files["lab/padded"]) == contents(tmp_path / "padded")
    for name in ("one.gguf", "two.gguf"):  # several files share a repository
        slimgpt.export(slim, tmp_path / name, "gguf", push_to_hub="me/gguf", check=False)
        assert hub.files["me/gguf"][name] == (tmp_path / name).read_bytes()
    (tmp_path / "again").mkdir()
    with pytest.raises(UsageError, match=r"holds one\.gguf already"):
        slimgpt.export(slim, tmp_path / "again" / "one.gguf", "gguf", push_to_hub="me/gguf", check=False)
    slimgpt.recover(
        slim, tmp_path / "better", text, push_to_hub="me/better", method="full", max_steps=1, batch_size=4,
        max_length=32, held_out=0,
    )  # fmt: skip
    assert without_attributes(hub.files["me/better"]) == contents(tmp_path / "better")


def test_an_upload_that_fails_keeps_the_folder_and_says_how_to_go_on(hub, dense_folder, text_file, tmp_path):
    answer = hub.answer

    def without_commits(method: str, path: str, token: str, body: bytes):
        return (403, {"error": "quota"}) if "/commit/" in path else answer(method, path, token, body)

    hub.answer = without_commits
    settings = {"num_samples": 8, "seq_len": 32, "allocation": "schedule"}
    with pytest.raises(OutputError, match=r"is whole, and its upload to me/slim failed.*hf upload me/slim"):
        slimgpt.prune_folder(
            str(dense_folder), tmp_path / "slim", 0.3, str(text_file), push_to_hub="me/slim", **settings
        )
    assert (tmp_path / "slim" / "model.safetensors").is_file()
