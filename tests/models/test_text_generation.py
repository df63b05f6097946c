"""Answers of several prompts at once against a loop of our own, one token at a time and without a cache."""

from __future__ import annotations

import pytest
import torch

import slimgpt
from slimgpt.errors import UsageError
from slimgpt.models.sampling import draw
from slimgpt.models.text_generation import Sampling, generate_answers, prompt_ids, room_for
from tests.models.families import VOCABULARY, tiny_model


def loud(name: str, **changes):
    """A tiny model whose layers have something to say, and that ends nothing by itself."""
    model = tiny_model(name, **changes)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def one_by_one(model, ids, count, choose=lambda logits, _step: int(logits.argmax())):
    written = []
    for step in range(count):
        with torch.no_grad():
            written.append(choose(model(torch.tensor([ids + written])).logits[0, -1], step))
    return written


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "falcon_h1", "lfm2"])
def test_a_batch_of_prompts_is_answered_as_each_alone(name, tokenizer):
    model, given = loud(name), prompts(3, 12, 7)
    answers = generate_answers(model, tokenizer, given, Sampling(8))
    assert [list(answer.ids) for answer in answers] == [one_by_one(model, ids, 8) for ids in given]
    assert not any(answer.stopped for answer in answers)
    assert len({answer.ids for answer in answers}) == 3


def test_a_slim_model_of_other_widths_in_every_layer(text_file, tokenizer):
    model = loud("llama")
    slimgpt.prune(model, tokenizer, 0.3, str(text_file), num_samples=8, seq_len=24, device="cpu")
    given = prompts(3, 12, 7)
    answers = generate_answers(model, tokenizer, given, Sampling(6), batch_size=2)
    assert [list(answer.ids) for answer in answers] == [one_by_one(model, ids, 6) for ids in given]


def test_every_answer_ends_where_it_ends_alone(tokenizer):
    """By an end token, a stop string or a full context, each in its own row."""
    model, given = loud("llama", max_position_embeddings=20), prompts(3, 15, 7)
    alone = [one_by_one(model, ids, 8) for ids in given]
    model.generation_config.eos_token_id = [alone[0][2]]
    stop = tokenizer.decode([alone[2][4]])
    answers = generate_answers(model, tokenizer, given, Sampling(8), stop=[stop, ""])

    def expected(written, room):
        for count in range(1, room + 1):
            if written[count - 1] in (alone[0][2], tokenizer.eos_token_id):
                return written[:count], True
            if stop in tokenizer.decode(written[:count][-(len(tokenizer(stop)["input_ids"]) + 2) :]):
                return written[:count], True
        return written[:room], False

    for answer, written, ids in zip(answers, alone, given):
        room = room_for(model, ids, 8)
        assert (list(answer.ids), answer.stopped) == expected(written, room)
        assert answer.text == tokenizer.decode(list(answer.ids), skip_special_tokens=True)
    assert answers[0].stopped
    assert [len(answers[1].ids), answers[1].stopped] in ([5, False], [len(expected(alone[1], 5)[0]), True])


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_answers_depend_on_prompt_and_seed_alone(top_p, tokenizer):
    model, given = loud("llama"), prompts(3, 12, 7)
    sampling = Sampling(8, temperature=1.3, top_p=top_p, seed=5)
    together = generate_answers(model, tokenizer, given, sampling)
    torch.manual_seed(1)  # whatever the global generator does
    assert generate_answers(model, tokenizer, given, sampling, batch_size=1) == together
    assert generate_answers(model, tokenizer, given[:1], sampling) == together[:1]
    assert generate_answers(model, tokenizer, given, Sampling(8, 1.3, top_p, seed=6)) != together
    uniforms = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))

    def nucleus(logits, step, row):
        p, order = (logits / 1.3).softmax(-1).sort(descending=True)
        dropped = order[p.cumsum(-1) - p >= top_p]
        kept = (logits / 1.3).index_fill(0, dropped, float("-inf"))
        return int(draw(kept[None], uniforms[row, step : step + 1]))

    for row, (ids, answer) in enumerate(zip(given, together)):
        assert list(answer.ids) == one_by_one(model, ids, 8, lambda logits, step, row=row: nucleus(logits, step, row))


def test_a_prompt_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(UsageError, match="the prompt and its answer"):
        generate_answers(loud("llama", max_position_embeddings=8), tokenizer, prompts(3, 8), Sampling(2))


def test_progress_counts_answers_and_training_mode_stays(tokenizer):
    model, counts = loud("llama").train(), []
    generate_answers(model, tokenizer, prompts(3, 4, 5), Sampling(2), batch_size=2, on_answers=counts.append)
    assert counts == [2, 1]
    assert model.training


def test_prompts_are_texts_or_messages(starting):
    starting.chat_template = (
        "{% for m in messages %}Q {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    assert prompt_ids(starting, "The mill") == starting("The mill")["input_ids"]
    messages = [{"role": "user", "content": "The mill"}]
    assert prompt_ids(starting, messages) == starting("Q The mill A", add_special_tokens=False)["input_ids"]
    starting.chat_template = None
