"""Text that the dense model writes, against the model's own predictions and transformers' generate."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from slimgpt.distillation.generate import generate_text
from slimgpt.errors import NumericalError
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.build import decoder_layers
from slimgpt.runtime.memory import Placement
from tests.models.families import NAMES, tiny_model, windows

IDS = windows(6, 24)


def run(budget: int = 10**12, dtype: torch.dtype | None = None) -> ExecutionContext:
    return ExecutionContext(torch.device("cpu"), Placement(budget, "device", "device"), dtype)


def written(model, count=12, length=20, seed=0, on_token=None, **options):
    take = decoder_layers(model).__getitem__
    ids, hidden = generate_text(model, take, IDS, count, length, seed, run(**options), on_token=on_token)
    check_hidden(model, ids, hidden)
    return ids


def check_hidden(model, ids, hidden):
    """They are what the last layer returns when the text is read at once."""
    outputs = []
    hook = decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), hook:
        model(input_ids=ids, use_cache=False)
    scale = float(outputs[0].abs().max())
    assert float((hidden - outputs[0]).abs().max()) < 1e-4 * scale


def sharp(model):
    """A model whose next token is all but certain, so that what is drawn is what generate takes."""
    for cap in ("final_logit_softcapping", "logits_soft_cap"):
        if getattr(model.config, cap, None):
            setattr(model.config, cap, 1e6)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1e4)
    return model


@pytest.mark.parametrize("family", NAMES)
def test_a_certain_model_writes_what_generate_does(family):
    model = sharp(tiny_model(family))
    ids = written(model, count=5)
    assert ids.shape == (5, 20)
    prompts = {tuple(row[start : start + 10].tolist()) for row in IDS for start in range(15)}
    assert {tuple(row[:10].tolist()) for row in ids} <= prompts
    ended = getattr(model.config.get_text_config(), "eos_token_id", None)
    generated = model.generate(
        ids[:, :10],
        attention_mask=torch.ones_like(ids[:, :10]),
        do_sample=False,
        min_new_tokens=10,
        max_new_tokens=10,
        pad_token_id=ended if isinstance(ended, int) else 0,
    )
    assert torch.equal(generated, ids)


def test_tokens_are_drawn_as_often_as_predicted():
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data *= 10  # far from equal chances
    take = decoder_layers(model).__getitem__
    ids, _ = generate_text(
        model, take, IDS[:1, :8], 4000, 9, 0, run()
    )  # half of a piece is given: four tokens and five
    start = ids[:, :4]
    one = (start == start[0]).all(1)
    with torch.no_grad():
        chances = model(start[:1]).logits[0, -1].softmax(-1)
    if (ended := model.config.eos_token_id) is not None:
        chances[ended] = 0
        chances /= chances.sum()
    drawn = torch.bincount(ids[one, 4], minlength=len(chances)) / one.sum()
    assert int(one.sum()) > 500
    assert float((drawn - chances).abs().max()) < 4 * (0.25 / float(one.sum())) ** 0.5


def test_what_is_written_depends_on_the_seed_alone():
    model, steps = tiny_model("llama"), []
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    ids = written(model, on_token=lambda *step: steps.append(step))
    assert [(number, count) for number, count, _ in steps] == [(n, 10) for n in range(10)]
    torch.manual_seed(5)
    assert torch.equal(written(model), ids)
    assert not torch.equal(written(model, seed=1), ids)
    assert len({tuple(row.tolist()) for row in ids}) == 12
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_little_memory_is_enough():
    """One piece at a time, every layer brought anew for every token; and the same is written."""
    model, steps = tiny_model("llama"), []
    ids = written(model, on_token=lambda *step: steps.append(step), budget=1)
    assert [(number, count) for number, count, _ in steps] == [(n, 120) for n in range(120)]
    assert torch.equal(ids, written(model))


def test_what_is_known_of_a_piece_is_not_copied_for_every_token(monkeypatch):
    """The cache has its room from the second token on; two of these layers keep a window of the last tokens alone."""
    model, places = tiny_model("gemma3_text"), []
    kinds = model.config.get_text_config().layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda self, *args: places.append(type(self)) or update(self, *args))
    written(model)
    assert places.count(DynamicLayer) == kinds.count("full_attention")  # once for each, with what the piece begins with


def test_a_broken_model_is_named():
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[3] = float("nan")
    with pytest.raises(NumericalError, match="dense model's predictions"):
        written(model)
