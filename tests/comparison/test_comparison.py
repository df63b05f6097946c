"""Models side by side: the numbers are those of the parts, and the page works in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from functools import cache
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import slimgpt
from slimgpt.comparison import CompareConfig, Comparison, ModelResult, Timing, Timings, time_models
from slimgpt.comparison.differences import Difference, task_difference
from slimgpt.comparison.html_report import write_page
from slimgpt.comparison.plots import figures
from slimgpt.comparison.row import ComparisonRow
from slimgpt.evaluation.samples import write_samples
from slimgpt.evaluation.speed import peak_memory
from slimgpt.evaluation.tasks import TaskScores, answers, difference, flips
from slimgpt.models.families.moe import EXPERTS
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.source import locate
from slimgpt.planning.cost import decode_bytes, generation_flops
from tests.cli.test_command_line import run
from tests.comparison.browser import CHROMIUM, browser
from tests.evaluation.conftest import data_dir  # noqa: F401  (a fixture)
from tests.models.families import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, text_file):
    """A tiny model of 256 positions, and two slim versions of it."""
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama", max_position_embeddings=256).save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    for name, ratio in (("slim-20", 0.2), ("slim-50", 0.5)):
        words = ["prune", root / "dense", root / name, "--ratio", ratio, "--schedule", "uniform"]
        assert (
            run(*words, "--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu").exit_code
            == 0
        )
    return root


@pytest.fixture(scope="module")
def compared(folders, text_file, data_dir, tmp_path_factory):  # noqa: F811
    """What `slimgpt compare` left, with everything that it can measure; the peak memory of one model, measured in a
    process of its own, stands for all."""
    out = tmp_path_factory.mktemp("compared") / "out"
    peak = cache(lambda: peak_memory(locate(str(folders / "slim-50")), "cpu", prompt=16, new_tokens=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["slimgpt.comparison.timing"], "peak_memory", lambda *_, **__: peak())
        done = run(
            "compare", folders / "dense", folders / "slim-20", folders / "slim-50", "--out", out, "--text", text_file,
            "--window", "32,64", "--max-tokens", 1024, "--tasks", "piqa,boolq", "--data-dir", data_dir, "--long", 200,
            "--batch", 1, "--prompt", 16, "--new-tokens", 4, "--rounds", 2, "--device", "cpu",
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, done.output


def test_compare_gives_the_numbers_of_its_parts(compared, folders, text_file, data_dir):  # noqa: F811
    out, printed = compared
    values = json.loads((out / "compare.json").read_text())
    assert [side["name"] for side in values["models"]] == ["dense", "slim-20", "slim-50"]
    model, tokenizer = slimgpt.load(str(folders / "slim-50"))
    side = values["models"][2]
    assert side["parameters"] == sum(p.numel() for p in model.parameters())
    assert side["removed"] == pytest.approx(0.5, abs=0.05)
    expected = slimgpt.evaluate(model, tokenizer, str(text_file), window=64, max_tokens=1024)
    assert side["perplexities"][1]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    against = slimgpt.evaluate(
        model, tokenizer, str(text_file), window=64, max_tokens=1024, against=str(folders / "dense")
    ).divergence
    measured = side["perplexities"][1]["divergence"]
    assert measured["kl"]["mean"] == pytest.approx(against.kl.mean, rel=1e-5)
    assert measured["kl"]["quantiles"] == pytest.approx(against.kl.quantiles, rel=1e-5)
    assert values["models"][0]["perplexities"][1]["divergence"] is None
    for shown in (f"{against.kl.mean:.4f}", f"{against.same_top:.1%}", f"{against.bits_per_byte:.4f}"):
        assert shown in (out / "report.html").read_text()
    scores = slimgpt.evaluate_tasks(model, tokenizer, "piqa,boolq", data_dir=data_dir)
    assert side["tasks"]["mean"] == scores.mean
    assert list(side["by_position"]["by_position"]) == ["1", "2", "4", "8", "16", "32", "64", "128"]
    assert str(text_file) in side["leaks"]
    assert values["models"][0]["leaks"] == {}
    assert [row["model"] for row in values["speed"]["ratios"]] == [str(folders / n) for n in ("slim-20", "slim-50")]
    assert all(row["peak_memory"] > 10e6 for row in values["speed"]["rows"])
    dense = slimgpt.evaluate_tasks(*slimgpt.load(str(folders / "dense")), "piqa,boolq", data_dir=data_dir)
    apart = difference(answers(dense), answers(scores))
    assert apart is not None
    left = scores.mean / dense.mean
    words = f"{left:.1%} of the base, {100 * apart[0]:+.1f} ± {100 * apart[1]:.1f} points"
    assert words in (out / "report.html").read_text()
    recovered = side["recovery"]["mean"]
    assert recovered["recovery"] == pytest.approx(left)
    assert (recovered["difference"]["value"], recovered["difference"]["stderr"]) == pytest.approx(apart)
    assert recovered["difference"]["count"] == sum(len(questions) for questions in answers(dense).values())
    assert "recovery" not in values["models"][0]
    share = flips(answers(dense), answers(scores))
    assert share is not None
    assert re.search(rf"<td>flips<.*<td[^>]*>-</td>.*<td>{share:.1%}</td></tr>", (out / "report.html").read_text())
    assert {"perplexity", "piqa", "128-199", "prefill", "calibrated"} <= set(re.findall(r"[\w-]+", printed))
    for name in ("quality.png", "quality.svg"):
        assert (out / name).stat().st_size > 5000


def test_the_texts_and_commands_of_every_model_stand_on_the_page(compared, folders):
    out, _ = compared
    page, values = (out / "report.html").read_text(), json.loads((out / "compare.json").read_text())
    for side in values["models"]:
        model, tokenizer = slimgpt.load(str(folders / side["name"]))
        assert side["samples"] == [sample.to_json() for sample in write_samples(model, tokenizer, 3)]
        for sample in side["samples"]:
            assert html.escape(sample["prompt"]) in page
            assert f"<dd>{html.escape(sample['text'])}" in page
    assert [len(side["commands"]) for side in values["models"]] == [0, 1, 1]
    card = (folders / "slim-50" / "README.md").read_text()
    (command,) = values["models"][2]["commands"]
    assert command.startswith("slimgpt prune dense OUT")
    assert command in card
    assert html.escape(command) in page
    assert str(folders) not in command


def test_the_protocol_in_words_has_the_numbers_of_the_protocol(compared):
    out, _ = compared
    page, base = (out / "report.html").read_text(), json.loads((out / "compare.json").read_text())["models"][0]
    for result in base["perplexities"]:
        how = result["protocol"]
        assert (
            f"the first {result['tokens']:,} of {how['text_tokens']:,} tokens in windows of {result['window']}" in page
        )
        assert how["engine"] in page
    assert base["tasks"]["protocol"]["harness"] in page
    shots = ", ".join(f"{task} {count}" for task, count in base["tasks"]["protocol"]["num_fewshot"].items())
    assert set(base["tasks"]["protocol"]["num_fewshot"]) == {"piqa", "boolq"}
    assert f"examples before a question: {shots}." in page
    assert "16 tokens are read and 4 written, 2 rounds" in page
    assert "Pass key" not in page


def test_no_texts_if_none_are_asked_for(folders, text_file, tmp_path):
    words = ["--text", text_file, "--window", 32, "--max-tokens", 64, "--no-speed", "--device", "cpu", "--out"]
    for samples, code in ((0, 0), (5, 2), (-1, 2)):
        out = tmp_path / str(samples)
        done = run("compare", folders / "dense", folders / "slim-20", *words, out, "--samples", samples)
        assert done.exit_code == code, done.output
    assert "What they write" not in (tmp_path / "0" / "report.html").read_text()
    assert json.loads((tmp_path / "0" / "compare.json").read_text())["models"][0]["samples"] == []


def test_the_page_asks_nobody_for_anything(compared):
    page = (compared[0] / "report.html").read_text()
    links = re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert [link for link in links if not link.startswith("#")] == []
    assert "@import" not in page
    assert "<script" not in page


# What is laid out, by JavaScript in the page.
BOXES = """[...document.querySelectorAll("figure")].map(figure => [...figure.querySelectorAll("svg text")].map(text => {
  const box = text.getBoundingClientRect();
  return {text: text.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom}; }))"""
SIZES = """[...document.querySelectorAll("svg text")].map(text => parseFloat(getComputedStyle(text).fontSize)
  * text.closest("svg").getBoundingClientRect().width / text.closest("svg").viewBox.baseVal.width)"""
COLOURS = """[...document.querySelectorAll("h1, h2, p, td, th, small, summary, pre, dt, dd")].filter(e => e.textContent)
  .map(element => { let under = element;
    while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)" && under !== document.body)
      under = under.parentElement;
    return [element.textContent.slice(0, 40), getComputedStyle(element).color,
      getComputedStyle(under).backgroundColor]; })"""
ROW = """[...document.querySelector("tbody tr:not(.group)").children].map(cell => cell.getBoundingClientRect())
  .map(box => [box.left, box.right])"""


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


WINDOWS = [(1100, "light"), (1100, "dark"), (390, "light")]


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_the_page_in_a_real_browser(width, scheme, compared, view, tmp_path):
    view.open(compared[0] / "report.html", width, scheme)
    assert view.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert [e for e in view.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")] == []
    asked = [e["params"]["request"]["url"] for e in view.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [(compared[0] / "report.html").as_uri()]
    text = view.evaluate("document.body.innerText")
    for words in ("dense", "slim-20", "slim-50", "piqa (acc_norm)", "decode, tokens per second"):
        assert words in text
    # Nothing is wider than the window but what scrolls by itself, and names in plots keep apart and can be read.
    assert view.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert len(view.evaluate(BOXES)) >= 5
    for texts in view.evaluate(BOXES):
        assert len(texts) > 3
        assert [(a["text"], b["text"]) for a, b in combinations(texts, 2) if overlap(a, b)] == []
    assert min(view.evaluate(SIZES)) >= 9
    low = [(words, ink, page) for words, ink, page in view.evaluate(COLOURS) if contrast(ink, page) < 4.5]  # WCAG AA
    assert low == []
    # Every plotted line is drawn in a colour that the page knows in both of its schemes.
    assert {"--c0", "--c1", "--c2"} <= set(re.findall(r"var\((--c\d)\)", view.evaluate("document.body.innerHTML")))
    view.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_phone_shows_the_slim_models_beside_the_names(compared, view):
    view.open(compared[0] / "report.html", 390, "light")
    name, dense, first, second = view.evaluate(ROW)
    assert name[0] < name[1] <= first[0] < first[1] <= second[0] < second[1] <= 390  # both without scrolling
    assert dense[0] >= second[1]
    view.open(compared[0] / "report.html", 1100, "light")
    name, dense, first, second = view.evaluate(ROW)
    assert name[1] <= dense[0] < dense[1] <= first[0] < first[1] <= second[0]


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two boxes share more than a pixel."""
    across, down = (min(a[end], b[end]) - max(a[start], b[start]) for start, end in BOX_SIDES)
    return across > 1 and down > 1


BOX_SIDES = (("left", "right"), ("top", "bottom"))


def contrast(ink: str, page: str) -> float:
    """The ratio of two colours' luminances (WCAG 2.2)."""
    bright, dim = sorted((luminance(ink), luminance(page)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_luminance_of_colours_is_that_of_wcag():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.005)


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that were loaded to be measured."""
    module, names = sys.modules["slimgpt.comparison.measure"], []
    load = module.load
    monkeypatch.setattr(module, "load", lambda name, *rest: names.append(Path(name).name) or load(name, *rest))
    return names


@pytest.mark.parametrize("changed", [False, True], ids=["same rows", "other rows"])
def test_a_killed_comparison_goes_on(changed, folders, text_file, data_dir, tmp_path, monkeypatch, loads):  # noqa: F811
    module, out = sys.modules["slimgpt.comparison.measure"], tmp_path / "out"
    data_dir = shutil.copytree(data_dir, tmp_path / "rows")
    words = [
        "compare", folders / "dense", tmp_path / "slim", "--text", text_file, "--max-tokens", 256, "--tasks", "piqa",
        "--data-dir", data_dir, "--long", 64, "--passkey", 100, "--no-speed", "--device", "cpu", "--out",
    ]  # fmt: skip
    shutil.copytree(folders / "slim-50", tmp_path / "slim")
    measure = module.evaluate_tasks

    def killed(*arguments, **options):
        if loads == ["dense", "slim"]:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_tasks", killed)
    interrupted = run(*words, out, "--window", "32")
    assert interrupted.exit_code == 130
    assert f"what is measured is kept in {tmp_path / '.out.measured'}" in "".join(interrupted.output.split("\n"))
    assert not out.exists()
    assert loads == ["dense", "slim"]
    if changed:
        file = next((data_dir / "piqa").iterdir())
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    loads.clear()
    texts, tasks = Counted(module.evaluate), Counted(measure)
    monkeypatch.setattr(module, "evaluate", texts)
    monkeypatch.setattr(module, "evaluate_tasks", tasks)
    assert run(*words, out, "--window", "32,16").exit_code == 0
    assert loads == ["dense", "slim"]
    assert texts.calls == 2 + 1  # window 16 of both, and the long one of the slim model
    assert tasks.calls == 1 + changed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run(*words, tmp_path / "whole", "--window", "32,16").exit_code == 0
    assert (out / "compare.json").read_text() == (tmp_path / "whole" / "compare.json").read_text()


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        return self.function(*arguments, **named)


def test_what_was_kept_of_another_model_of_that_name_is_not_used(folders, text_file, tmp_path, loads, monkeypatch):
    words = ["compare", folders / "dense", tmp_path / "slim", "--text", text_file, "--window", 32, "--max-tokens", 256,
             "--device", "cpu", "--out", tmp_path / "out", "--prompt", 8, "--new-tokens", 2, "--rounds", 1]  # fmt: skip
    monkeypatch.setattr(sys.modules["slimgpt.comparison.timing"], "peak_memory", lambda *_, **__: 1)  # starts processes
    shutil.copytree(folders / "slim-50", tmp_path / "slim")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["slimgpt.comparison.compare"], "time_models", None)  # as if killed there
        assert run(*words).exit_code == 1
    assert loads == ["dense", "slim"]
    shutil.rmtree(tmp_path / "slim")
    shutil.copytree(folders / "slim-20", tmp_path / "slim")
    loads.clear()
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert loads == ["slim", "dense"]  # the divergence is taken from it
    model, tokenizer = slimgpt.load(str(folders / "slim-20"))
    expected = slimgpt.evaluate(model, tokenizer, str(text_file), window=32, max_tokens=256)
    slim = json.loads((tmp_path / "out" / "compare.json").read_text())["models"][1]
    assert slim["perplexities"][0]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_compare_replaces_only_comparisons(compared, folders, text_file, tmp_path):
    words = ["--text", text_file, "--window", 32, "--max-tokens", 64, "--no-speed", "--device", "cpu"]
    out, _ = compared
    assert "exists" in run("compare", folders / "dense", folders / "slim-20", "--out", out, *words).output
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    done = run("compare", folders / "dense", folders / "slim-20", "--out", tmp_path / "thesis", "--overwrite", *words)
    assert done.exit_code == 2
    assert "holds no comparison" in " ".join(done.output.split())
    done = run("compare", folders / "dense", folders / "nothing", "--out", tmp_path / "new", *words)
    assert done.exit_code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "32,300"], "a window of 300 tokens: that is longer than the model's context of 256"),
        (["--window", "1"], "too small"),
        (["--long", 300], "a window of 300 tokens"),
        (["--long", 1], "too small"),
        (["--passkey", "100,300"], "a text of 300 tokens"),
        (["--prompt", 250, "--new-tokens", 10], "--prompt 250 and --new-tokens 10, a text of 260 tokens"),
        (["--rounds", 0], "must be at least 1"),
        (["--tasks", "piqa,pica"], "task 'pica' is unknown"),
        (["--tasks", "piqa,winogrande"], "winogrande"),
        (["--tasks", "piqa", "--limit", 0], "--limit is 0; it must be at least 1"),
        (["--chat-template"], "are for tasks: give --tasks, too"),
        (["--tasks", "piqa", "--chat-template"], "the tokenizer of dense has no chat template"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is(words, message, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["slimgpt.comparison.measure"], "load", None)  # calling it would fail
    rows = tmp_path / "rows/piqa/validation.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"goal": "eat", "sol1": "chew", "sol2": "sing", "label": 0}\n')
    models = (folders / "dense", folders / "slim-20", "--out", tmp_path / "new", "--data-dir", tmp_path / "rows")
    done = run("compare", *models, "--device", "cpu", "--prompt", 16, "--new-tokens", 4, *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "new").exists()


def test_all_models_are_looked_for_before_one_is_measured(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys.modules["slimgpt.comparison.measure"], "load", None)
    done = run("compare", folders / "dense", "nobody/nothing", "--out", tmp_path / "new", "--no-speed")
    assert done.exit_code == 2
    assert "cannot read the model 'nobody/nothing'" in " ".join(done.output.split())


def test_speed_prints_ratios_beside_those_of_flops(folders, tmp_path):
    result = tmp_path / "speed.json"
    words = [
        "--batch",
        "1,2",
        "--prompt",
        16,
        "--new-tokens",
        4,
        "--rounds",
        2,
        "--no-memory",
        "--device",
        "cpu",
        "--json",
        result,
    ]
    done = run("speed", folders / "slim-50", "--against", folders / "dense", *words)
    assert done.exit_code == 0, done.output
    values = json.loads(result.read_text())
    assert [row["batch"] for row in values["rows"]] == [1, 1, 2, 2]
    ratio, (dense, slim) = values["ratios"][1], values["rows"][2:]
    assert ratio["batch"] == 2
    assert ratio["decode"] == pytest.approx(slim["decode"] / dense["decode"])
    assert ratio["decode_flops"] == pytest.approx(dense["decode_flops"] / slim["decode_flops"])
    assert ratio["decode_flops"] > 1
    assert f"FLOPs promise {ratio['decode_flops']:.2f}, bytes read promise {ratio['decode_bytes']:.2f}" in done.output
    assert dense["decode_bytes"] < values["rows"][0]["decode_bytes"]  # two rows share the weights
    assert slim["peak_memory"] is None
    too_long = run("speed", folders / "dense", "--prompt", 300, "--no-memory", "--device", "cpu")
    assert too_long.exit_code == 2
    assert "longer than the model's context" in " ".join(too_long.output.split())


def test_ratios_of_made_up_timings():
    def timing(model, scale):
        return Timing(
            model, 1, 100 * scale, 400 * scale, 50 / scale, 5 / scale, 1.0, None, 8.0 * scale, 10.0 * scale, 4.0 * scale
        )

    timings = Timings((timing("base", 2), timing("slim", 1)), "base", {})
    assert timings.ratios() == {
        ("slim", 1): {
            "prefill": 2.0, "decode": 2.0, "first_token": 1.0, "prefill_flops": 2.0, "decode_flops": 2.0,
            "decode_bytes": 2.0, "parameters": 0.5, "bytes": 0.5,
        }
    }  # fmt: skip


def test_flops_are_those_of_the_matrices():
    """Counted over the Linear modules of a real model, and over QK^T and the product with V."""
    model = tiny_model("llama", tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    body = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and "norm" not in name)
    prefill, decode = generation_flops(config, layer_sizes(config), parameters, 10, 4)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert prefill == 2 * (body + norms) + attention * 5
    assert decode == 2 * (body + norms + config.vocab_size * config.hidden_size) + attention * 12


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step_are_the_weights_and_the_cache(tied):
    """Counted over the parameters of a real model and over the tensors of its cache."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    cache = model(torch.ones(3, 10, dtype=torch.long), use_cache=True).past_key_values
    cached = sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))
    parameters = sum(p.numel() for p in model.parameters())
    read = parameters - (0 if tied else model.get_input_embeddings().weight.numel())
    assert decode_bytes(model.config, layer_sizes(model.config), parameters, 4, 10, 3) == 4 * (read + cached)


def test_experts_that_no_token_goes_to_cost_nothing():
    """Of seven experts two are active, in every second layer; the expected number that rows go to, from all choices."""
    sizes = {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "decoder_sparse_step": 2}
    model = tiny_model("qwen3_moe", tie_word_embeddings=False, mlp_only_layers=[], **sizes)
    config, layers = model.config, layer_sizes(model.config)
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    held = sum(p.numel() for p in stacks)
    sparse = sum(EXPERTS in layer for layer in layers)
    assert 0 < sparse < len(layers)
    parameters = sum(p.numel() for p in model.parameters())
    dense = parameters - held - config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    expected = 2 * (dense + held * 2 / 7) + attention * 12
    assert generation_flops(config, layers, parameters, 10, 4)[1] == pytest.approx(expected)
    pairs = list(combinations(range(7), 2))
    chosen = fmean(len({*one, *two, *three}) for one, two, three in product(pairs, repeat=3))
    for rows, number in ((1, 2), (3, chosen), (1000, 7)):
        read = 2 * (dense + held * number / 7)
        assert decode_bytes(config, layers, parameters, 2, 0, rows) == pytest.approx(read)


def test_a_head_is_tied_where_the_whole_config_says_so():
    """As transformers takes it, whatever the config of the language model says."""
    config = AutoConfig.for_model("mistral3", tie_word_embeddings=False)
    layers = layer_sizes(config)
    text = config.get_text_config()
    text.tie_word_embeddings = True
    untied = decode_bytes(config, layers, 10**10, 2, 0)
    assert untied == 2 * (10**10 - text.vocab_size * text.hidden_size)
    config.tie_word_embeddings = True
    assert decode_bytes(config, layers, 10**10, 2, 0) == 2 * 10**10


def test_rows_of_the_table():
    row = ComparisonRow("size", "parameters", (200.0, 100.0, None), ",.0f", "less")
    assert [row.text(i) for i in range(3)] == ["200", "100", "-"]
    assert [row.change(i) for i in range(3)] == [None, 0.5, None]


def test_what_may_be_chance_is_neither_good_nor_bad():
    few, many = Difference(-0.4, 0.0, 5), Difference(-0.04, 0.01, 2000)
    within = Difference(-0.04, 0.03, 2000)
    row = ComparisonRow("tasks", "a (acc)", (0.8, 0.4, 0.76, 0.76), ".1%", "more", "", (None, few, many, within))
    assert [row.verdict(i) for i in range(4)] == ["", "", "bad", ""]
    assert row.change_text(2) == "95.0% of the base, -4.0 ± 1.0 points"
    falling = ComparisonRow("quality", "b", (30.0, 25.0), ",.2f", "less", "", (None, Difference(-0.18, 0.01, 500)))
    assert (falling.verdict(1), falling.change_text(1)) == ("good", "x 0.833, ln -0.180 ± 0.010")
    unknown = ComparisonRow("tasks", "group (acc)", (0.8, 0.4), ".1%", "more", "", (None, None))
    assert (unknown.verdict(1), unknown.change_text(1)) == ("", "50.0% of the base")


def test_five_questions_are_not_coloured_on_the_page(folders, data_dir, tmp_path):  # noqa: F811
    words = ["--tasks", "boolq", "--limit", 5, "--data-dir", data_dir, "--no-speed", "--max-tokens", 64]
    (tmp_path / "text.txt").write_text("The river runs past the old mill and on to the sea. " * 20)
    done = run("compare", folders / "dense", folders / "slim-50", "--out", tmp_path / "out", "--text",
               tmp_path / "text.txt", "--window", 32, "--device", "cpu", *words)  # fmt: skip
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report.html").read_text()
    cells = re.findall(r"<tr><td>(?:boolq \(acc\)|mean).*?</tr>", page)
    assert len(cells) == 2
    assert not re.search(r'class="(good|bad)"', "".join(cells))


def made_up_side(name: str, scores: dict[str, dict[str, float]], **other: Any) -> ModelResult:
    tasks = TaskScores(scores, None, None, None, {"tasks": list(scores)}, {})
    return ModelResult(name, 100, None, tasks=tasks, **other)


def test_no_bar_stands_for_a_score_that_is_no_share():
    base = {"gsm8k": {"exact_match": 0.4, "exact_match_stderr": 0.1}, "samsum": {"rouge": 12.0}}
    sides = (made_up_side("base", base), made_up_side("slim", {**base, "gsm8k": {"exact_match": 0.3}}))
    (figure,) = figures(Comparison(sides, None, CompareConfig()))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["gsm8k"]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([40, 30])
    rouge = tuple(made_up_side(name, {"samsum": {"rouge": 12.0}}) for name in ("base", "slim"))
    assert figures(Comparison(rouge, None, CompareConfig())) == []


def test_only_the_base_is_called_dense(tmp_path):
    """A GGUF file has no report, and may be slim."""
    sides = (ModelResult("base", 200, None), ModelResult("slim.gguf", 100, None))
    write_page(Comparison(sides, None, CompareConfig()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<small>dense</small>") == 1
    assert '<th class="base">base<small>dense</small></th><th>slim.gguf</th>' in page


@pytest.mark.parametrize("bytes_each", [(4.0, 4.1), (0.6, 4.0)])
def test_bytes_are_compared_like_with_like(bytes_each):
    rows = [
        Timing(name, 1, count, int(count * each), 1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0)
        for name, count, each in zip(("base", "slim"), (1000, 800), bytes_each)
    ]
    sides = tuple(ModelResult(row.model, row.parameters, None) for row in rows)
    table = {row.name: row for row in Comparison(sides, Timings(tuple(rows), "base", {}), CompareConfig()).table()}
    alike = bytes_each[0] == 4.0
    assert (table["MB on disk"].change(1) is not None) == alike
    assert ("MB with 16 bits per parameter" in table) != alike
    if not alike:
        assert table["MB with 16 bits per parameter"].change(1) == 0.8
        assert (table["MB on disk"].verdict(1), table["MB on disk"].change_text(1)) == ("", "")
        assert "0.6, 4 bytes per parameter" in table["MB on disk"].note


def test_differences_of_tasks_are_those_of_their_questions(folders, data_dir):  # noqa: F811
    base, slim = (
        slimgpt.evaluate_tasks(*slimgpt.load(str(folders / name)), "piqa,boolq", data_dir=data_dir)
        for name in ("dense", "slim-50")
    )
    for task in ("piqa", "boolq"):
        ours, theirs = answers(base)[task], answers(slim)[task]
        changes = [theirs[number] - score for number, score in ours.items()]
        mean = sum(changes) / len(changes)
        error = (sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes)) ** 0.5
        apart = task_difference(base, slim, task)
        assert apart is not None
        assert (apart.value, apart.stderr, apart.count) == pytest.approx((mean, error, len(changes)))


def test_timing_without_a_base(folders):
    timings = time_models([str(folders / "dense")], None, (1,), 8, 2, 1, device="cpu", memory=False)
    assert timings.ratios() == {}
    assert timings.rows[0].first_token > 0
